"""scgen models of scArches: their three files to our models, and our weights in their layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from scarcade.engine.errors import ModelFileError
from scarcade.engine.schema import Categories, Schema
from scarcade.models.interop.foreign import load_fitting, read_attributes, read_three_files, reason
from scarcade.models.saved import check_schema
from scarcade.models.scgen import Scgen

HEADS = {"mean": "encoder.mean_encoder", "log_variance": "encoder.log_var_encoder", "scale": "decoder.recon_decoder.0"}


def is_scgen(path: str | Path) -> bool:
    """Whether the folder at `path` holds a scgen model of scArches: its attributes name the dimensions of x and z.

    Raises:
        UnsafeFileError, ModelFileError: as `read_pickle`.
    """
    attributes = read_attributes(Path(path))
    return attributes is not None and {"x_dim_", "z_dim_"} <= attributes.keys()


def read_scgen(path: str | Path) -> Scgen:
    """The scgen model in a folder of scArches, in evaluation mode. It names no batches: there is one, "0".

    Raises:
        OpenError: the three files are not there. UnsafeFileError: one of them names more than a model needs.
        ModelFileError: another class of model, or tensors that do not fit the settings.
    """
    return build(*read_three_files(Path(path)), where=str(path))


def build(state: Mapping[str, np.ndarray], names: list[str], attributes: Mapping[str, Any], *, where: str) -> Scgen:
    """The model of a state dict, gene names and the attributes that scArches saves beside them.

    Raises:
        ModelFileError: as `read_scgen`; its message begins with `where`.
    """
    try:
        schema = Schema(genes=tuple(names), batch=Categories("batch", ("0",)))
        config = Scgen.Config(
            hidden_layer_sizes=tuple(attributes["hidden_layer_sizes_"]),
            n_latent=attributes["z_dim_"],
            dropout_rate=attributes["dr_rate_"],
        )
        model = Scgen(config, schema)
        load_fitting(model, from_state(model, state))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{where}: not laid out as a scgen model of scArches ({error!r})") from error
    except (ModelFileError, ValidationError, RuntimeError) as error:
        raise ModelFileError(f"{where}: {reason(error)}") from error
    check_schema(schema, where)
    model.eval()
    model.record = {"imported_from": "scArches", "model": "scgen"}
    return model


def from_state(model: Scgen, state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Their state dict as that of `model`.

    Raises:
        ModelFileError: a tensor is missing.
    """
    out = {}
    for name in model.state_dict():
        value = state.get(foreign_name(name))
        if value is None:
            raise ModelFileError(f"tensor {foreign_name(name)} is missing")
        out[name] = torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    return out


def to_state(model: Scgen, tensors: Mapping[str, Tensor] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_state`, of the model's state dict or of other tensors by our names (gradients)."""
    given = model.state_dict() if tensors is None else tensors
    return {foreign_name(name): tensor.detach().cpu().numpy() for name, tensor in given.items()}


def foreign_name(name: str) -> str:
    """Our tensor's name in their state dict: "decoder.norm.1.bias" -> "decoder.HiddenL.N1.bias"."""
    part, *rest = name.split(".")
    if part in HEADS:
        return ".".join([HEADS[part], *rest])
    kind, number, tensor = rest
    layer = int(number) + (part == "encoder" and kind == "norm")  # the encoder's first layer has no norm
    stack = "FC" if part == "encoder" else "FirstL" if layer == 0 else "HiddenL"
    return f"{part}.{stack}.{'L' if kind == 'linear' else 'N'}{layer}.{tensor}"
