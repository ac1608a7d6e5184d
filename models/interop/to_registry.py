"""What scvi-tools notes of the data of a model (`setup_anndata`), from the schema of one of ours."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scarcade.engine.schema import Categories, Schema
from scarcade.models.scanvi import Scanvi
from scarcade.models.scvi import Scvi

VERSION = "1.4.2"
"""Of scvi-tools, whose files and formulas these are."""
UNLABELLED = "Unknown"


def registry_of(model: Scvi, name: str, proteins: str) -> dict[str, Any]:
    """What `setup_anndata` of scvi-tools would have noted of the data."""
    schema = model.schema
    labels = labels_used(model)
    layer = layer_of(schema)
    arguments: dict[str, Any] = {
        "batch_key": schema.batch.name,
        "categorical_covariate_keys": [one.name for one in schema.categorical] or None,
        "continuous_covariate_keys": list(schema.continuous) or None,
        "layer": layer,
        "size_factor_key": schema.size_factor,
    }
    fields: dict[str, Any] = {
        "X": _field(
            ("layers" if layer else "X", layer),
            {"n_obs": 0, "n_vars": schema.n_genes, "column_names": np.array(schema.genes, dtype=object)},
            {"n_vars": schema.n_genes, "n_cells": 0},
        ),
        "batch": _column("batch", schema.batch.name, schema.batch.values),
        "size_factor": _field(("obs", schema.size_factor) if schema.size_factor else None, {}, {}),
        "extra_categorical_covs": _categorical(schema),
        "extra_continuous_covs": _field(
            ("obsm", "_scvi_extra_continuous_covs") if schema.continuous else None,
            {"columns": np.array(schema.continuous, dtype=object)} if schema.continuous else {},
            {"n_extra_continuous_covs": len(schema.continuous)},
        ),
    }
    if name == "TOTALVI":
        arguments |= {
            "protein_expression_obsm_key": proteins,
            "protein_names_uns_key": None,
            "panel_key": None,
        }
        names = list(schema.proteins)  # it is compared with a list
        fields["proteins"] = _field(("obsm", proteins), {"column_names": names}, {"n_proteins": len(names)})
    else:
        arguments["labels_key"] = None if labels is None else labels.name
    if labels is None:  # scvi-tools gives all cells one label of its own
        fields["labels"] = _column("labels", "_scvi_labels", np.zeros(1, np.int64))
    elif name == "SCANVI":
        unlabelled = unlabelled_of(schema)
        fields["labels"] = _column("labels", labels.name, (*labels.values, unlabelled))
        fields["labels"]["state_registry"]["unlabeled_category"] = unlabelled
        arguments |= {"unlabeled_category": unlabelled, "use_minified": True}
    else:
        fields["labels"] = _column("labels", labels.name, labels.values)
    return {
        "scvi_version": VERSION,
        "model_name": name,
        "setup_args": arguments,
        "field_registries": fields,
        "setup_method_name": "setup_anndata",
    }


def labels_used(model: Scvi) -> Categories | None:
    """The labels that scvi-tools would ask new cells for: only where the model computes with them."""
    if isinstance(model, Scanvi) or model.config.dispersion == "gene-label":
        return model.schema.labels[0]
    return None


def unlabelled_of(schema: Schema) -> str:
    """A name for cells without a label that is no label: one that was said to mean that, if there is one."""
    name, labels = next(iter(schema.unlabelled), UNLABELLED), schema.labels[0].values
    while name in labels:
        name = f"_{name}"
    return name


def layer_of(schema: Schema) -> str | None:
    """The layer that new cells have their counts in, None: X (also where counts were in raw, or in several places)."""
    name = schema.counts_from.removeprefix("layers/")  # models that were imported by early versions
    return None if name in ("X", "raw.X") or ", " in name else name


def told_of_counts(schema: Schema, tool: str) -> list[str]:
    """What should be known where a tool does not look where the counts were."""
    wanted = layer_of(schema) if tool == "scvi-tools" else None
    if schema.counts_from == "X" or wanted is not None:
        return []
    return [f"counts were in {schema.counts_from}, and {tool} takes them from X: give it cells that have them there"]


def told_of_columns(schema: Schema, *, labels: bool = False) -> str:
    """Which columns cells need."""
    text = [schema.batch.name, *(one.name for one in schema.categorical), *(one.name for one in schema.labels[:labels])]
    numbers = [*schema.continuous, *([schema.size_factor] if schema.size_factor else [])]
    more = f"; as numbers: {', '.join(numbers)}" if numbers else ""
    return f"columns of obs that it wants, as text: {', '.join(text)}{more}"


def _field(where: tuple[str, str | None] | None, state: dict[str, Any], summary: dict[str, int]) -> dict[str, Any]:
    data = {} if where is None else {"attr_name": where[0], "attr_key": where[1]}
    return {"data_registry": data, "state_registry": state, "summary_stats": summary}


def _column(field: str, name: str, values: Sequence[str] | np.ndarray) -> dict[str, Any]:
    mapping = values if isinstance(values, np.ndarray) else np.array(values, dtype=object)
    state = {"categorical_mapping": mapping, "original_key": name}
    count = {"batch": "n_batch", "labels": "n_labels"}[field]
    return _field(("obs", f"_scvi_{field}"), state, {count: len(mapping)})


def _categorical(schema: Schema) -> dict[str, Any]:
    columns = schema.categorical
    state = {
        "mappings": {one.name: np.array(one.values, dtype=object) for one in columns},
        "field_keys": [one.name for one in columns],
        "n_cats_per_key": [len(one) for one in columns],
    }
    where = ("obsm", "_scvi_extra_categorical_covs") if columns else None
    return _field(where, state if columns else {}, {"n_extra_categorical_covs": len(columns)})
