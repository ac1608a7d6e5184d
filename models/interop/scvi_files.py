"""What models of scvi-tools have in common as files: two layouts, the registry of their data, arguments, tensors.

``model.pt`` (since 0.15) and the three files before it. The pickles are read by `interop.pickles`, so nothing of them
is run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scarcade.engine.errors import ModelFileError, OpenError
from scarcade.engine.schema import Categories, Schema
from scarcade.models.interop.foreign import FILES, read_three_files
from scarcade.models.interop.pickles import read_pickle

OLD_KEYS = {
    "batch_indices": "batch",
    "cat_covs": "extra_categorical_covs",
    "cont_covs": "extra_continuous_covs",
    "protein_expression": "proteins",
}


def read_files(path: Path) -> tuple[dict[str, np.ndarray], list[str], dict[str, Any]]:
    """State dict, gene names and attributes, from either layout.

    Raises:
        OpenError: there is no such model. UnsafeFileError: a file names more than a model needs.
        ModelFileError: it holds something else.
    """
    if path.is_file():
        content = read_pickle(path)
    elif len(found := sorted(path.glob("*model.pt"))) == 1:
        content = read_pickle(found[0])
    elif all((path / name).is_file() for name in FILES):
        return read_three_files(path)
    else:
        raise OpenError(
            f"{path}: no model of scvi-tools: wanted one model.pt, or attr.pkl with model_params.pt "
            "and var_names.csv (of scArches, too)"
        )
    try:
        state, names, attributes = content["model_state_dict"], content["var_names"], content["attr_dict"]
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"{path}: not a model of scvi-tools (no {error})") from error
    if not isinstance(state, dict) or not isinstance(names, list) or not isinstance(attributes, dict):
        raise ModelFileError(f"{path}: not a model of scvi-tools that can be imported")
    return {k: v for k, v in state.items() if isinstance(v, np.ndarray)}, list(map(str, names)), attributes


def old_registry(setup: Mapping[str, Any]) -> dict[str, Any]:
    """The registry of today from the setup dictionary of versions before 0.15."""
    fields: dict[str, Any] = {}
    for key, where in (setup.get("data_registry") or {}).items():
        column = setup.get("categorical_mappings", {}).get(where["attr_key"], {})
        state = {"categorical_mapping": column["mapping"], "original_key": column["original_key"]} if column else {}
        fields[OLD_KEYS.get(key, key)] = {"state_registry": state}
    if extra := setup.get("extra_categoricals"):
        fields["extra_categorical_covs"] = {"state_registry": extra | {"field_keys": extra["keys"]}}
    if proteins := setup.get("protein_names"):
        fields["proteins"] = {"state_registry": {"column_names": list(proteins)}}
    if continuous := setup.get("extra_continuous_keys"):
        fields["extra_continuous_covs"] = {"state_registry": {"columns": list(continuous)}}
    return {"scvi_version": setup.get("scvi_version"), "field_registries": fields}


def schema_of(registry: Mapping[str, Any], names: list[str], n_classes: int | None = None) -> Schema:
    """Genes, batches, labels and covariates that a model was registered with; proteins are left out.

    Args:
        n_classes: outputs of the classifier, where there is one; its labels are the first of the mapping.
    """
    fields = registry["field_registries"]
    arguments = registry.get("setup_args") or {}

    def state(key: str) -> Mapping[str, Any]:
        return dict(fields.get(key, {}).get("state_registry") or {})

    def categories(key: str) -> Categories | None:
        found = state(key)
        if "categorical_mapping" not in found:
            return None
        original = str(found.get("original_key", key)).removeprefix("_scvi_")
        return Categories(original, tuple(str(value) for value in found["categorical_mapping"]))

    labels = categories("labels")
    if labels is not None and len(labels) == 1 and labels.name == "labels":
        labels = None  # no label column was registered
    if labels is not None and n_classes is not None:  # the unlabelled category is the last one, and is no class
        labels = Categories(labels.name, labels.values[:n_classes])
    extra = state("extra_categorical_covs")
    mappings = extra.get("mappings", extra.get("mapping", {}))
    return Schema(
        genes=tuple(names),
        batch=categories("batch") or Categories("batch", ("0",)),
        labels=() if labels is None else (labels,),
        categorical=tuple(
            Categories(str(key), tuple(str(v) for v in mappings[key])) for key in extra.get("field_keys", ())
        ),
        continuous=tuple(map(str, state("extra_continuous_covs").get("columns", ()))),
        size_factor=arguments.get("size_factor_key"),
        counts_from=str(arguments.get("layer") or "X"),
    )


def init_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model's constructor, from any version's `init_params_`."""
    flat: dict[str, Any] = {}
    for key, value in given.items():
        if key in ("kwargs", "model_kwargs") and isinstance(value, dict):
            for name, inner in value.items():
                flat |= inner if isinstance(inner, dict) and key == "kwargs" else {name: inner}
        elif key == "non_kwargs":
            flat |= value
        else:
            flat[key] = value
    return flat


def tensor_of(state: Mapping[str, Any], name: str) -> np.ndarray:
    """The tensor `name` of a state dict.

    Raises:
        ModelFileError: there is none.
    """
    value = state.get(name)
    if not isinstance(value, np.ndarray):
        raise ModelFileError(f"tensor {name} is missing")
    return value
