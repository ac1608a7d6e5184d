"""Our models as ``model.pt`` of scvi-tools: weights, the registry of the data, arguments of the constructor.

Written is what scvi-tools 1.4.2 writes (specification of ``save_load`` there), without anything of single cells: their
labels and which of them were trained on stay here. Tensors that scvi-tools makes and never uses are zeros.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scarcade.engine.errors import ModelFileError
from scarcade.models.interop import scvi_tools, totalvi
from scarcade.models.interop.to_registry import labels_used, registry_of, told_of_columns, told_of_counts, unlabelled_of
from scarcade.models.interop.written import state_dict, write_archive
from scarcade.models.scanvi import Scanvi
from scarcade.models.scvi import Scvi
from scarcade.models.totalvi import Totalvi

_SHARED = ("log_variational", "encode_covariates", "use_batch_norm", "use_layer_norm")
"""Arguments of the module that the model hands on."""
_OF_SCVI = (
    "n_hidden",
    "n_latent",
    "n_layers",
    "dropout_rate",
    "dispersion",
    "gene_likelihood",
    "use_observed_lib_size",
)


def write_scvi_tools(model: Scvi, folder: Path, proteins: str) -> tuple[str, list[str]]:
    """Write ``model.pt`` into `folder`; (class in scvi-tools, what the user should know).

    Args:
        proteins: entry of obsm in which new cells have their proteins.

    Raises:
        ModelFileError: scvi-tools has no such model.
    """
    name = {Scvi: "SCVI", Scanvi: "SCANVI", Totalvi: "TOTALVI"}[type(model)]
    content = {
        "model_state_dict": state_of(model),
        "var_names": np.array(model.schema.genes, dtype=object),
        "attr_dict": _attributes(model, name, proteins),
    }
    write_archive(content, folder / "model.pt")
    return name, _notes(model, name, proteins)


def state_of(model: Scvi) -> dict[str, Any]:
    """The state dict of the module in scvi-tools.

    Raises:
        ModelFileError: scvi-tools computes something else with such weights.
    """
    if isinstance(model, Totalvi):
        if model.config.formulation != "1.3.1":
            raise ModelFileError(
                f"the model computes as scvi-tools {model.config.formulation} did (formulation), and a file of today "
                "would be read with today's formulas"
            )
        if model.config.dispersion == "gene-label" or model.config.protein_dispersion == "protein-label":
            raise ModelFileError("TOTALVI of scvi-tools takes no labels, which this model's dispersion is of")
        if not model.config.deeply_inject_covariates:
            raise ModelFileError("conditions enter the first layers alone (deeply_inject_covariates), in TOTALVI all")
        found = totalvi.to_state(model)
        head = found["decoder.px_scale_decoder.fc_layers.Layer 0.0.weight"]
        shapes = _layer("decoder.px_dropout_decoder_gene.fc_layers.Layer 0.0", head.shape)
        shapes |= _library(found, "encoder.encoder", "encoder.l_gene_encoder", "encoder.l_gene_{}_encoder")
    else:
        if isinstance(model, Scanvi) and model.config.dispersion == "gene-label":
            raise ModelFileError("SCANVI of scvi-tools has no dispersion by label")
        found = scvi_tools.to_state(model)
        head = found["decoder.px_scale_decoder.0.weight"]
        shapes = _layer("decoder.px_r_decoder", head.shape) | _layer("decoder.px_dropout_decoder", head.shape)
        shapes |= _library(found, "z_encoder.encoder", "l_encoder.encoder", "l_encoder.{}_encoder")
        shapes |= _dispersion(model)
    unused = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    return {**state_dict(unused | found), "pyro_param_store": {"params": {}, "constraints": {}}}


def _layer(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _library(found: Mapping[str, np.ndarray], latent: str, trunk: str, heads: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the encoder of the library, which is there also where the library is observed: one layer and two heads.

    Args:
        latent: the name of the encoder of the latent, whose first layer has the same shape. trunk, heads: names.
    """
    first = f"{latent}.fc_layers.Layer 0."
    shapes = {key.replace(latent, trunk): value.shape for key, value in found.items() if key.startswith(first)}
    width = found[f"{first}0.bias"].shape[0]
    for one in ("mean", "var"):
        shapes |= _layer(heads.format(one), (1, width))
    return shapes


def _dispersion(model: Scvi) -> dict[str, tuple[int, ...]]:
    """That of a likelihood which has none."""
    schema, kind = model.schema, model.config.dispersion
    if kind == "gene-cell":
        return {}
    widths = {"gene-batch": (len(schema.batch),), "gene-label": (schema.n_labels,)}
    return {"px_r": (schema.n_genes, *widths.get(kind, ()))}


def _attributes(model: Scvi, name: str, proteins: str) -> dict[str, Any]:
    none = np.zeros(0, np.int64)
    attributes: dict[str, Any] = {
        "get_normalized_function_name_": "get_normalized_expression",
        "history_": {},
        "init_params_": _arguments(model, name),
        "is_trained_": True,
        "registry_": registry_of(model, name, proteins),
        "run_id_": "",
        "run_name_": "scarcade",
        "train_indices_": none,
        "validation_indices_": none,
        "test_indices_": none,
    }
    if name == "SCANVI":
        attributes |= {
            "labels_": np.zeros(0, object),
            "unlabeled_category_": unlabelled_of(model.schema),
            "semisupervised_history_": None,
            "unsupervised_history_": None,
        }
    return attributes


def _arguments(model: Scvi, name: str) -> dict[str, Any]:
    """Arguments of the constructor, as `init_params_` has them."""
    config = model.config
    handed = {key: getattr(config, key) for key in _SHARED}
    if isinstance(config, Totalvi.Config):
        own: dict[str, Any] = {
            "n_latent": config.n_latent,
            "gene_dispersion": config.dispersion,
            "protein_dispersion": config.protein_dispersion,
            "gene_likelihood": config.gene_likelihood,
            "latent_distribution": config.latent_distribution,
            "empirical_protein_background_prior": config.empirical_background,
            "override_missing_proteins": False,
        }
        handed |= {
            "n_hidden": config.n_hidden,
            "n_layers_encoder": config.n_layers,
            "n_layers_decoder": config.n_layers_decoder,
            "dropout_rate_encoder": config.dropout_rate,
            "dropout_rate_decoder": config.dropout_rate_decoder,
        }
        if not config.use_observed_lib_size:
            handed["use_observed_lib_size"] = False
        return {"non_kwargs": own, "kwargs": {"model_kwargs": handed}}
    own = {key: getattr(config, key) for key in _OF_SCVI}
    handed["deeply_inject_covariates"] = config.deeply_inject_covariates
    if not isinstance(config, Scanvi.Config):
        return {
            "non_kwargs": own | {"latent_distribution": config.latent_distribution},
            "kwargs": {"kwargs": handed},
        }
    classifier = {
        "n_layers": None if config.linear_classifier else config.classifier_layers,  # they would undo the former
        "n_hidden": None if config.linear_classifier else config.classifier_hidden,
        "dropout_rate": config.classifier_dropout,
    }
    if given := {key: value for key, value in classifier.items() if value is not None}:
        handed["classifier_parameters"] = given
    own |= {"linear_classifier": config.linear_classifier, "datamodule": None}
    return {"non_kwargs": own, "kwargs": {"model_kwargs": handed}}


def _notes(model: Scvi, name: str, proteins: str) -> list[str]:
    schema, used = model.schema, labels_used(model)
    notes = [told_of_columns(schema, labels=used is not None), *told_of_counts(schema, "scvi-tools")]
    if name == "TOTALVI":
        notes.append(f"proteins of new cells are looked for in obsm[{proteins!r}]")
    if name == "SCANVI" and used is not None:
        notes.append(
            f"cells without a label are those with {unlabelled_of(schema)!r} in {used.name!r}; scvi-tools wants one of "
            "them at least among the cells that it is given"
        )
    if name == "SCVI" and schema.labels and used is None:
        notes.append(f"SCVI does not learn from labels: those of {schema.labels[0].name!r} are not in the file")
    if name == "SCVI" and used is not None:
        notes.append("SCVI knows no cells without a label: the dispersion of those is not in the file")
    return notes
