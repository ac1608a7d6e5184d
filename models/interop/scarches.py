"""TRVAE and EXPIMAP models of scArches: their three files to our models, and our weights in their layout.

``model_params.pt`` (tensors), ``attr.pkl`` (settings, conditions in code order) and ``var_names.csv`` (a gene a
line). The class is told by the keys: nothing names it. The pickles are read by `interop.pickles`, so nothing of
them is run. Shapes: H outputs of a layer, I inputs, K conditions, G genes, E terms.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from scarcade.engine.errors import ModelFileError, UsageError
from scarcade.engine.schema import Categories, Schema
from scarcade.models.expimap import Expimap
from scarcade.models.interop.foreign import load_fitting, read_attributes, read_three_files, reason
from scarcade.models.layers import BatchNorm, ConditionRows, Dispersion, Linear
from scarcade.models.saved import check_schema
from scarcade.models.scarches_layers import PlainLinear, SplitLinear
from scarcade.models.terms import Terms
from scarcade.models.trvae import Trvae

ScarchesModel = Trvae | Expimap


def read_scarches(path: str | Path) -> ScarchesModel:
    """The TRVAE or EXPIMAP model in a folder of scArches, in evaluation mode.

    Names of expiMap's programs are not in its files; they are ``term_0``, ``term_1``, ...

    Raises:
        OpenError: the three files are not there. UnsafeFileError: one of them names more than a model needs.
        ModelFileError: another class of model, or tensors that do not fit the settings.
    """
    return build(*read_three_files(Path(path)), where=str(path))


def is_scarches(path: str | Path) -> bool:
    """Whether the three files in the folder `path` are those of scArches; old ones of scvi-tools have the same names.

    Raises:
        UnsafeFileError, ModelFileError: as `read_pickle`.
    """
    attributes = read_attributes(Path(path))
    return attributes is not None and "conditions_" in attributes


def build(
    state: Mapping[str, np.ndarray], names: list[str], attributes: Mapping[str, Any], *, where: str
) -> ScarchesModel:
    """The model of a state dict, gene names and the attributes that scArches saves beside them.

    Raises:
        ModelFileError: as `read_scarches`; its message begins with `where`.
    """
    try:
        kind = _kind(state)
        schema = Schema(
            genes=tuple(names),
            batch=Categories(
                str(attributes["condition_key_"]), tuple(str(value) for value in attributes["conditions_"])
            ),
        )
        config: Any = kind.Config.model_validate(_config(kind, attributes, names))
        model = kind(config, schema)
        load_fitting(model, from_state(model, state))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelFileError(f"{where}: not laid out as a model of scArches ({error!r})") from error
    except (ModelFileError, UsageError, ValidationError, RuntimeError) as error:
        raise ModelFileError(f"{where}: {reason(error)}") from error
    check_schema(schema, where)
    model.eval()
    model.record = {"imported_from": "scArches", "model": kind.name}
    return model


def from_state(model: ScarchesModel, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Their state dict as that of `model`, which may be a grown one: its new rows are their last columns.

    Raises:
        ModelFileError: a tensor is missing, or the model has covariates beside the batch. (Another shape is found by
            `load_fitting`.)
    """
    # which gene is in which program is in the settings
    out = {k: v for k, v in model.state_dict().items() if k.rsplit(".", 1)[-1] in ("mask", "new_mask")}

    def put(name: str, foreign: str, turn: Callable[[np.ndarray], np.ndarray] = np.asarray) -> None:
        if foreign not in state:
            raise ModelFileError(f"it has no tensor {foreign}")
        out[name] = torch.from_numpy(np.array(turn(state[foreign]), dtype=np.float32, order="C"))

    def put_rows(path: str, table: ConditionRows, foreign: str, turn: Callable[[np.ndarray], np.ndarray]) -> None:
        n = len(table.rows)
        put(f"{path}.rows", foreign, lambda value: turn(value)[:n])
        if table.new is not None:
            put(f"{path}.new", foreign, lambda value: turn(value)[n:])

    for ours, foreign, turn, table in _pairs(model):
        if table is None:
            put(ours, foreign, turn)
        else:
            put_rows(ours, table, foreign, turn)
    return out


def to_state(model: ScarchesModel, tensors: Mapping[str, Tensor] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_state`: rows are one-hot columns again, grown ones after the others.

    Args:
        tensors: what to convert, by our names; the model's state dict if not given. Missing ones (the
            gradients of frozen parameters) count as zero.

    Raises:
        ModelFileError: scArches has no such model: covariates beside the batch, both kinds of new terms at once.
    """
    given = model.state_dict() if tensors is None else tensors
    shapes = model.state_dict()

    def get(name: str) -> np.ndarray:
        return (given[name] if name in given else torch.zeros_like(shapes[name])).detach().cpu().numpy()

    out: dict[str, np.ndarray] = {}
    for ours, foreign, turn, table in _pairs(model):
        if table is None:
            value = get(ours)
        else:
            value = np.concatenate([get(f"{ours}.rows")] + ([get(f"{ours}.new")] if table.new is not None else []))
        out[foreign] = np.ascontiguousarray(turn(value))
    return out


def _plain(value: np.ndarray) -> np.ndarray:
    return value


def _turned(value: np.ndarray) -> np.ndarray:
    return value.T


def _column(value: np.ndarray) -> np.ndarray:
    """(E,) -> (E, 1), and back."""
    return value[:, None] if value.ndim == 1 else value[:, 0]


Pair = tuple[str, str, Callable[[np.ndarray], np.ndarray], ConditionRows | None]


def _pairs(model: ScarchesModel) -> list[Pair]:
    """(our tensor or table, their tensor, what turns one into the other, the table)."""
    out: list[Pair] = []
    for path, module in model.named_modules():
        theirs = foreign_name(model, path)
        if isinstance(module, SplitLinear):
            out.append((f"{path}.weight", f"{theirs}.expr_L.weight", _plain, None))
            if module.bias is not None:
                out.append((f"{path}.bias", f"{theirs}.expr_L.bias", _plain, None))
            if others := [name for name in module.conditions if name != "batch"]:
                raise ModelFileError(
                    f"the model has {len(others)} more categorical covariates than the batch, for which scArches has "
                    "no place"
                )
            table = module.conditions["batch"]
            assert isinstance(table, ConditionRows)
            out.append((f"{path}.conditions.batch", f"{theirs}.cond_L.weight", _turned, table))
        elif isinstance(module, BatchNorm):
            parts = ("weight", "bias", "running_mean", "running_var")
            out += [(f"{path}.{part}", f"{theirs}.{part}", _plain, None) for part in parts]
        elif isinstance(module, Linear):
            out += [(f"{path}.{part}", f"{theirs}.{part}", _plain, None) for part in ("weight", "bias")]
        elif isinstance(module, PlainLinear):
            out.append((f"{path}.weight", f"{theirs}.weight", _plain, None))
        elif isinstance(module, Dispersion):
            out.append((path, "theta", _turned, module))
        elif isinstance(module, Terms):
            if isinstance(model, Expimap) and len(list(model.kinds_of_terms())) > 1:
                raise ModelFileError("constrained and unconstrained new terms at once cannot be converted")
            for part, foreign, turn in (
                ("mean", "encoder.expand_mean_encoder.weight", _plain),
                ("mean_bias", "encoder.expand_mean_encoder.bias", _column),
                ("log_variance", "encoder.expand_var_encoder.weight", _plain),
                ("log_variance_bias", "encoder.expand_var_encoder.bias", _column),
                ("genes", f"decoder.L0.{'ext_L' if module.covariate == 'free' else 'ext_L_m'}.weight", _turned),
            ):
                table = getattr(module, part)
                out.append((f"{path}.{part}", foreign, turn, table))
    if isinstance(model, Expimap) and not model.config.soft_mask:
        out.append(("mask", "decoder.L0.expr_L.mask", _plain, None))
    return out


def foreign_name(model: nn.Module, path: str) -> str:  # noqa: PLR0911  (a table)
    """Our module's path in their state dict: "encoder.trunk.hidden.0" -> "encoder.FC.L1"."""
    parts = path.split(".")
    match parts:
        case ["encoder", "trunk", "first"]:
            return "encoder.FC.L0"
        case ["encoder", "trunk", "hidden", i]:
            return f"encoder.FC.L{int(i) + 1}"
        case ["encoder", "trunk", "norm", i]:
            return f"encoder.FC.N{i}"
        case ["encoder", "mean"]:
            return "encoder.mean_encoder"
        case ["encoder", "log_variance"]:
            return "encoder.log_var_encoder"
        case ["decoder"]:
            return "decoder.L0"
        case ["decoder", "first"]:
            return "decoder.FirstL.L0"
        case ["decoder", "hidden", i]:
            return f"decoder.HiddenL.L{int(i) + 1}"
        case ["decoder", "norm", i]:
            return "decoder.FirstL.N0" if i == "0" else f"decoder.HiddenL.N{i}"
        case ["scale"]:
            mse = isinstance(model, Trvae) and model.config.recon_loss == "mse"
            return "decoder.recon_decoder.0" if mse else "decoder.mean_decoder.0"
        case ["dropout"]:
            return "decoder.dropout_decoder"
    return path


def _kind(state: Mapping[str, np.ndarray]) -> type[ScarchesModel]:
    if "decoder.L0.expr_L.weight" in state:
        return Expimap
    if "encoder.FC.L0.expr_L.weight" in state and not any(key.startswith("embeddings.") for key in state):
        return Trvae
    raise ModelFileError("neither a TRVAE nor an EXPIMAP model of scArches; those can be imported so far")


def _config(kind: type[ScarchesModel], attributes: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    common = {
        "hidden_layer_sizes": attributes["hidden_layer_sizes_"],
        "dropout_rate": attributes["dr_rate_"],
        "recon_loss": attributes["recon_loss_"],
        "norm": "batch" if attributes["use_bn_"] else "layer" if attributes["use_ln_"] else "none",
    }
    if kind is Trvae:
        return common | {
            "n_latent": attributes["latent_dim_"],
            "use_mmd": attributes["use_mmd_"],
            "mmd_on": "z" if attributes["mmd_on_"] == "z" else "y",
            "mmd_boundary": attributes["mmd_boundary_"],
            "beta": attributes["beta_"],
        }
    if attributes.get("use_l_encoder_"):
        raise ModelFileError("an EXPIMAP model with a library encoder (use_l_encoder) cannot be imported")

    def programs(mask: Any, prefix: str) -> dict[str, list[str]]:
        rows = [] if mask is None else list(mask)  # a list of lists, or an array
        if any(len(row) != len(names) for row in rows):
            raise ModelFileError(f"a mask of programs of {len(rows[0])} genes, where {len(names)} names were expected")
        return {
            f"{prefix}{i}": [gene for gene, inside in zip(names, row, strict=True) if inside]
            for i, row in enumerate(rows)
        }

    return common | {
        "programs": programs(attributes["mask_"], "term_"),
        "new_programs": programs(attributes.get("ext_mask_"), "constrained_"),
        "n_ext": attributes.get("n_ext_", 0),
        "soft_mask": attributes.get("soft_mask_", False),
        "soft_ext_mask": attributes.get("soft_ext_mask_", False),
        "use_hsic": attributes.get("use_hsic_", False),
        "hsic_one_vs_all": attributes.get("hsic_one_vs_all_", False),
        "decoder_last_layer": attributes.get("decoder_last_layer_"),
    }
