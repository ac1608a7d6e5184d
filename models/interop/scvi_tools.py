"""SCVI and SCANVI models of scvi-tools: their files to our models, and our weights in their layout.

One-hot columns of every injected layer become rows of embedding tables (`from_state`), and back
(`to_state`). Files and what they say of the data are read by `scvi_files`; totalVI has a file of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from scarcade.engine.errors import ModelFileError, UsageError
from scarcade.engine.schema import Schema
from scarcade.models.interop import totalvi
from scarcade.models.interop.foreign import load_fitting, reason
from scarcade.models.interop.scvi_files import init_arguments, old_registry, read_files, schema_of, tensor_of
from scarcade.models.layers import BatchNorm, ConditionalLinear, ConditionRows, Dispersion, Linear
from scarcade.models.library import LibraryPrior
from scarcade.models.saved import check_schema
from scarcade.models.scanvi import Scanvi
from scarcade.models.scvi import Scvi

PREFIXES = {
    "encoder.trunk": "z_encoder.encoder",
    "encoder.mean": "z_encoder.mean_encoder",
    "encoder.variance": "z_encoder.var_encoder",
    "library.trunk": "l_encoder.encoder",
    "library.mean": "l_encoder.mean_encoder",
    "library.variance": "l_encoder.var_encoder",
    "decoder": "decoder.px_decoder",
    "scale": "decoder.px_scale_decoder.0",
    "dropout": "decoder.px_dropout_decoder",
    "theta": "decoder.px_r_decoder",
    "classifier.trunk": "classifier.classifier.0",
    "classifier.head": "classifier.classifier.1",
    "z2_encoder.trunk": "encoder_z2_z1.encoder",
    "z2_encoder.mean": "encoder_z2_z1.mean_encoder",
    "z2_encoder.variance": "encoder_z2_z1.var_encoder",
    "z1_decoder.trunk": "decoder_z1_z2.decoder",
    "z1_decoder.mean": "decoder_z1_z2.mean_decoder",
    "z1_decoder.variance": "decoder_z1_z2.var_decoder",
}
KINDS: dict[str, type[Scvi]] = {"SCVI": Scvi, "SCANVI": Scanvi}
DROPPED = {"use_cuda", "use_gpu", "var_activation", "batch_representation", "use_size_factor_key"}
DROPPED |= {
    "labels_groups",
    "use_labels_groups",
    "y_prior",
    "logits",
    "datamodule",
    "registry",
}  # the prior is in the state dict


def read_scvi_tools(path: str | Path) -> Scvi:
    """The SCVI, SCANVI or TOTALVI model in a ``model.pt``, or in a folder that holds one (or the three older files).

    The result is in evaluation mode; ``record`` says which version of scvi-tools wrote it.

    Raises:
        OpenError: there is no such model. UnsafeFileError: the file names more than a model needs.
        ModelFileError: not such a model, or its tensors do not fit what it says of itself.
    """
    path = Path(path)
    return build(*read_files(path), where=str(path))


def build(state: Mapping[str, np.ndarray], names: list[str], attributes: Mapping[str, Any], *, where: str) -> Scvi:
    """The model of a state dict, gene names and the attributes that scvi-tools saves beside them.

    Raises:
        ModelFileError: as `read_scvi_tools`; its message begins with `where`.
    """
    registry = attributes.get("registry_") or old_registry(attributes.get("scvi_setup_dict_") or {})
    # until 0.15 nothing in the files names the class; only a totalVI has a background of proteins
    name = registry.get("model_name") or ("TOTALVI" if "background_pro_alpha" in state else "SCVI")
    if name == "TOTALVI":
        return totalvi.build(state, names, attributes, where=where)
    if name not in KINDS:
        known = f"{', '.join(KINDS)} and TOTALVI"
        raise ModelFileError(f"{where}: is a {name} model of scvi-tools; {known} can be imported so far")
    kind = KINDS[name]
    try:
        schema = schema_of(registry, names, n_classes=state["y_prior"].shape[-1] if kind is Scanvi else None)
        config = _config(attributes.get("init_params_") or {}, state, schema, kind)
        model = kind(config, schema)
        load_fitting(model, from_state(model, state))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelFileError(f"{where}: not laid out as a model of scvi-tools ({error!r})") from error
    except (ModelFileError, UsageError, ValidationError, RuntimeError) as error:
        raise ModelFileError(f"{where}: {reason(error)}") from error
    check_schema(schema, where)
    model.eval()
    model.record = {"imported_from": "scvi-tools", "version": registry.get("scvi_version"), "model": name}
    return model


def from_state(model: Scvi, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Their state dict as that of `model`, which may be a grown one: its new rows are the last columns of a block.

    Tensors that the model does not use (l_encoder, ...) are left out.

    Raises:
        ModelFileError: a tensor is missing or has another shape.
    """
    out: dict[str, Tensor] = {}
    linear_classifier = getattr(model.config, "linear_classifier", False)

    def put(name: str, foreign: str, value: np.ndarray | None = None) -> None:
        value = tensor_of(state, foreign) if value is None else value
        out[name] = torch.from_numpy(np.array(value, dtype=np.float32, order="C"))

    def put_table(path: str, table: ConditionRows, foreign: str, rows: np.ndarray) -> None:
        put(f"{path}.rows", foreign, rows[: len(table.rows)])
        if table.new is not None:
            put(f"{path}.new", foreign, rows[len(table.rows) :])

    for path, module in model.named_modules():
        theirs = foreign_name(path, linear_classifier)
        if isinstance(module, ConditionalLinear):
            weight = tensor_of(state, f"{theirs}.weight")
            start = module.weight.shape[1]
            put(f"{path}.weight", theirs, weight[:, :start])
            put(f"{path}.bias", f"{theirs}.bias")
            for covariate, table in module.conditions.items():
                assert isinstance(table, ConditionRows)
                stop = start + len(table.table())
                put_table(f"{path}.conditions.{covariate}", table, theirs, weight[:, start:stop].T)
                start = stop
            if weight.shape[1] != start:
                raise ModelFileError(f"{theirs}.weight has {weight.shape[1]} columns, {start} were expected")
        elif isinstance(module, BatchNorm | Linear):
            statistics = ("running_mean", "running_var") if isinstance(module, BatchNorm) else ()
            for part in ("weight", "bias", *statistics):
                put(f"{path}.{part}", f"{theirs}.{part}")
        elif isinstance(module, Dispersion):
            rows = np.atleast_2d(tensor_of(state, "px_r").T)
            if module.covariate == "label":  # ours has one row more, for cells without a label
                rows = np.concatenate([rows, rows.mean(0, keepdims=True)])
            put_table(path, module, "px_r", rows)
        elif isinstance(module, LibraryPrior):
            for part, foreign in (("mean", "library_log_means"), ("variance", "library_log_vars")):
                values = tensor_of(state, foreign)[0]
                put(f"{path}.{part}", foreign, values[: len(module.mean)])
                if module.new_mean is not None:
                    put(f"{path}.new_{part}", foreign, values[len(module.mean) :])
    if isinstance(model, Scanvi):
        put("label_prior", "y_prior", tensor_of(state, "y_prior")[0])
    return out


def to_state(model: Scvi, tensors: Mapping[str, Tensor] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_state`: rows are joined to one-hot columns again, grown ones after the others.

    Args:
        tensors: what to convert, by our names; the model's state dict if not given. Missing ones (the
            gradients of frozen parameters) count as zero.
    """
    given = model.state_dict() if tensors is None else tensors
    shapes = model.state_dict()

    def get(name: str) -> np.ndarray:
        return (given[name] if name in given else torch.zeros_like(shapes[name])).detach().cpu().numpy()

    def rows(path: str) -> np.ndarray:
        parts = [get(f"{path}.rows")] + ([get(f"{path}.new")] if f"{path}.new" in shapes else [])
        return np.concatenate(parts)

    out: dict[str, np.ndarray] = {}
    linear_classifier = getattr(model.config, "linear_classifier", False)
    for path, module in model.named_modules():
        theirs = foreign_name(path, linear_classifier)
        if isinstance(module, ConditionalLinear):
            tables = [rows(f"{path}.conditions.{covariate}").T for covariate in module.conditions]
            out[f"{theirs}.weight"] = np.concatenate([get(f"{path}.weight"), *tables], axis=1)
            out[f"{theirs}.bias"] = get(f"{path}.bias")
        elif isinstance(module, BatchNorm | Linear):
            statistics = ("running_mean", "running_var") if isinstance(module, BatchNorm) else ()
            for part in ("weight", "bias", *statistics):
                out[f"{theirs}.{part}"] = get(f"{path}.{part}")
        elif isinstance(module, Dispersion):
            table = rows(path)
            table = table[:-1] if module.covariate == "label" else table
            out["px_r"] = table[0] if module.covariate == "gene" else np.ascontiguousarray(table.T)
        elif isinstance(module, LibraryPrior):
            mean, variance = module.parts()
            out["library_log_means"] = mean.cpu().numpy()[None]
            out["library_log_vars"] = variance.cpu().numpy()[None]
    if isinstance(model, Scanvi):
        out["y_prior"] = get("label_prior")[None]
    return out


def foreign_name(path: str, linear_classifier: bool = False) -> str:
    """Our module's path in their state dict: "decoder.linear.0" -> "decoder.px_decoder.fc_layers.Layer 0.0"."""
    if path == "classifier.head" and linear_classifier:
        return "classifier.classifier.0"
    for ours, theirs in PREFIXES.items():
        if path == ours or path.startswith((f"{ours}.linear.", f"{ours}.norm.")):
            parts = path.removeprefix(ours).strip(".").split(".")
            if parts == [""]:
                return theirs
            return f"{theirs}.fc_layers.Layer {parts[1]}.{0 if parts[0] == 'linear' else 1}"
    return path


def _config(given: Mapping[str, Any], state: Mapping[str, Any], schema: Schema, kind: type[Scvi] = Scvi) -> Scvi.Config:
    flat = init_arguments(given)
    if flat.get("batch_representation", "one-hot") != "one-hot":
        raise ModelFileError("batches are embedded (batch_representation='embedding'); only one-hot can be imported")
    if flat.get("var_activation") is not None:
        raise ModelFileError("a var_activation of its own cannot be imported")
    flat = {key: value for key, value in flat.items() if key not in DROPPED}
    for key in ("use_batch_norm", "use_layer_norm"):
        if isinstance(flat.get(key), bool):  # until 0.9
            flat[key] = "both" if flat[key] else "none"
    # without its priors a latent library (versions before 0.9) leaves nothing to compute it with
    flat.setdefault("use_observed_lib_size", "library_log_means" not in state)
    if "library_log_means" not in state and schema.size_factor is None:
        flat["use_observed_lib_size"] = True
    classifier = flat.pop("classifier_parameters", None) or {}
    for theirs, ours in (("n_layers", "layers"), ("n_hidden", "hidden"), ("dropout_rate", "dropout")):
        if theirs in classifier:
            flat[f"classifier_{ours}"] = classifier[theirs]
    return kind.Config.model_validate(flat)
