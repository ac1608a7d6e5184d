"""TOTALVI models of scvi-tools (since 0.15): their state dicts as ours, and back.

What a model computes depends on the version that saved it, which nothing in its weights says: `formulation`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from scarcade.engine.errors import ModelFileError, UsageError
from scarcade.models.interop.foreign import load_fitting, reason
from scarcade.models.interop.scvi_files import init_arguments, old_registry, schema_of, tensor_of
from scarcade.models.layers import BatchNorm, ConditionalLinear, ConditionRows, Dispersion, Linear
from scarcade.models.library import LibraryPrior
from scarcade.models.saved import check_schema
from scarcade.models.totalvi import Totalvi

TRUNKS = {
    "encoder.trunk": "encoder.encoder",
    "library.trunk": "encoder.l_gene_encoder",
    "decoder": "decoder.px_decoder",
    "background_decoder": "decoder.py_back_decoder",
    "foreground_decoder": "decoder.py_fore_decoder",
    "mixing_decoder": "decoder.sigmoid_decoder",
}
NAMES = {
    "encoder.mean": "encoder.z_mean_encoder",
    "encoder.variance": "encoder.z_var_encoder",
    "library.mean": "encoder.l_gene_mean_encoder",
    "library.variance": "encoder.l_gene_var_encoder",
    "scale": "decoder.px_scale_decoder.fc_layers.Layer 0.0",
    "dropout": "decoder.px_dropout_decoder_gene.fc_layers.Layer 0.0",
    "background_mean": "decoder.py_back_mean_log_alpha.fc_layers.Layer 0.0",
    "background_sd": "decoder.py_back_mean_log_beta.fc_layers.Layer 0.0",
    "foreground": "decoder.py_fore_scale_decoder.fc_layers.Layer 0.0",
    "mixing": "decoder.py_background_decoder.fc_layers.Layer 0.0",
}
TABLES = {
    "theta": "px_r",
    "protein_theta": "py_r",
    "background.mean": "background_pro_alpha",
    "background.log_sd": "background_pro_log_beta",
    "efficiency": "log_per_batch_efficiency",
}
FIELDS = {
    "n_layers_encoder": "n_layers",
    "dropout_rate_encoder": "dropout_rate",
    "gene_dispersion": "dispersion",
    "empirical_protein_background_prior": "empirical_background",
}
DROPPED = {"override_missing_proteins", "use_size_factor_key", "n_panel", "panel_key"}
FIRST = (0, 15)


def build(state: Mapping[str, np.ndarray], names: list[str], attributes: Mapping[str, Any], *, where: str) -> Totalvi:
    """The model of a state dict, gene names and the attributes that scvi-tools saves beside them.

    Raises:
        ModelFileError: it is of a version that computed something else, or its tensors do not fit.
    """
    registry = attributes.get("registry_") or old_registry(attributes.get("scvi_setup_dict_") or {})
    version = str(registry.get("scvi_version"))
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < FIRST:  # its first versions call themselves 0.0.0
        by = f"scvi-tools {version}" if any(numbers) else "a scvi-tools before 0.15"
        raise ModelFileError(f"{where}: is a TOTALVI model of {by}; those since 0.15 can be imported")
    formulation = "1.3.1" if numbers >= (1, 3, 1) else "1.2" if numbers >= (1, 2) else "1.0"
    try:
        columns = registry["field_registries"]["proteins"]["state_registry"]["column_names"]
        schema = replace(schema_of(registry, names), proteins=tuple(map(str, columns)))
        model = Totalvi(_config(attributes.get("init_params_") or {}, formulation), schema)
        if tensor_of(state, "background_pro_alpha").shape != (len(schema.proteins), len(schema.batch)):
            raise ModelFileError("its background prior is not one of each batch (panel_key), which is not known here")
        load_fitting(model, from_state(model, state))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelFileError(f"{where}: not laid out as a model of scvi-tools ({error!r})") from error
    except (ModelFileError, UsageError, ValidationError, RuntimeError) as error:
        raise ModelFileError(f"{where}: {reason(error)}") from error
    check_schema(schema, where)
    model.eval()
    model.record = {"imported_from": "scvi-tools", "version": version, "model": "TOTALVI"}
    return model


def from_state(model: Totalvi, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Their state dict as that of `model`, which may be a grown one: its new rows are the last columns of a block.

    The adversary, which scvi-tools does not save, keeps the weights that it has.

    Raises:
        ModelFileError: a tensor is missing or has another shape.
    """
    out = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("adversary.")}
    for path, module in model.named_modules():
        theirs = foreign_name(path)
        if theirs is None:
            continue
        for name, value in _parts(module, theirs, state):
            out[f"{path}.{name}"] = torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    return out


def _parts(module: nn.Module, theirs: str, state: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one of our modules that has weights, from those whose names begin with `theirs`."""
    if isinstance(module, ConditionalLinear):
        weight = tensor_of(state, f"{theirs}.weight")
        start = module.weight.shape[1]
        yield "weight", weight[:, :start]
        yield "bias", tensor_of(state, f"{theirs}.bias")
        for covariate, table in module.conditions.items():
            assert isinstance(table, ConditionRows)
            stop = start + len(table.table())
            yield from _rows(f"conditions.{covariate}.", table, weight[:, start:stop].T)
            start = stop
        if weight.shape[1] != start:
            raise ModelFileError(f"{theirs}.weight has {weight.shape[1]} columns, {start} were expected")
    elif isinstance(module, BatchNorm | Linear):
        norm = ("running_mean", "running_var") if isinstance(module, BatchNorm) else ()
        for part in ("weight", "bias", *norm):
            yield part, tensor_of(state, f"{theirs}.{part}")
    elif isinstance(module, ConditionRows):
        rows = np.atleast_2d(tensor_of(state, theirs).T)
        if isinstance(module, Dispersion) and module.covariate == "label":  # a row for cells without a label
            rows = np.concatenate([rows, rows.mean(0, keepdims=True)])
        yield from _rows("", module, rows)
    elif isinstance(module, LibraryPrior):
        for part, foreign in (("mean", "library_log_means"), ("variance", "library_log_vars")):
            values = tensor_of(state, foreign)[0]
            yield part, values[: len(module.mean)]
            if module.new_mean is not None:
                yield f"new_{part}", values[len(module.mean) :]


def _rows(prefix: str, table: ConditionRows, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{prefix}rows", rows[: len(table.rows)]
    if table.new is not None:
        yield f"{prefix}new", rows[len(table.rows) :]


def to_state(model: Totalvi, tensors: Mapping[str, Tensor] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_state`: rows are joined to one-hot columns again, grown ones after the others.

    Args:
        tensors: what to convert, by our names; the model's state dict if not given. Missing ones (the
            gradients of frozen parameters) count as zero.
    """
    shapes = model.state_dict()
    given = shapes if tensors is None else tensors

    def get(name: str) -> np.ndarray:
        return (given[name] if name in given else torch.zeros_like(shapes[name])).detach().cpu().numpy()

    def rows(path: str) -> np.ndarray:
        return np.concatenate([get(f"{path}.{part}") for part in ("rows", "new") if f"{path}.{part}" in shapes])

    out: dict[str, np.ndarray] = {}
    for path, module in model.named_modules():
        theirs = foreign_name(path)
        if theirs is None:
            continue
        if isinstance(module, ConditionalLinear):
            tables = [rows(f"{path}.conditions.{covariate}").T for covariate in module.conditions]
            out[f"{theirs}.weight"] = np.concatenate([get(f"{path}.weight"), *tables], axis=1)
            out[f"{theirs}.bias"] = get(f"{path}.bias")
        elif isinstance(module, BatchNorm):
            for part in ("weight", "bias", "running_mean", "running_var"):
                out[f"{theirs}.{part}"] = get(f"{path}.{part}")
        elif isinstance(module, Linear):
            out[f"{theirs}.weight"], out[f"{theirs}.bias"] = get(f"{path}.weight"), get(f"{path}.bias")
        elif isinstance(module, ConditionRows):
            table = rows(path)
            table = table[:-1] if module.covariate == "label" else table
            shared = module.covariate in ("gene", "protein")
            out[theirs] = table[0] if shared else np.ascontiguousarray(table.T)
        elif isinstance(module, LibraryPrior):
            mean, variance = module.parts()
            out["library_log_means"] = mean.cpu().numpy()[None]
            out["library_log_vars"] = variance.cpu().numpy()[None]
    return out


def foreign_name(path: str) -> str | None:
    """Our module's path in their state dict; None if it is not a module of theirs."""
    if path in NAMES or path in TABLES:
        return {**NAMES, **TABLES}[path]
    if ".conditions" in path:  # a part of its layer
        return None
    for ours, theirs in TRUNKS.items():
        if path.startswith((f"{ours}.linear.", f"{ours}.norm.")):
            kind, number = path.removeprefix(f"{ours}.").split(".")[:2]
            return f"{theirs}.fc_layers.Layer {number}.{0 if kind == 'linear' else 1}"
    return path if path == "library_prior" else None


def _config(given: Mapping[str, Any], formulation: str) -> Totalvi.Config:
    flat = init_arguments(given)
    if flat.pop("extra_encoder_kwargs", None):
        raise ModelFileError("extra_encoder_kwargs of its own cannot be imported")
    if extra := flat.pop("extra_decoder_kwargs", None):
        background = extra.get("activation_function_bg")
        if extra.keys() != {"activation_function_bg"} or (formulation == "1.3.1" and background == "exp"):
            raise ModelFileError(f"extra_decoder_kwargs {extra} cannot be imported")
        if formulation != "1.3.1":
            formulation = "1.0" if background == "exp" else "1.2"
    known = {FIELDS.get(k, k): v for k, v in flat.items() if k not in DROPPED}
    return Totalvi.Config.model_validate({**known, "formulation": formulation})
