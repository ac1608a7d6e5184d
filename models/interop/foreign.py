"""What the readers of other tools' models share: three files in a folder, names of genes, tensors that must fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor, nn

from scarcade.engine.errors import ModelFileError, OpenError
from scarcade.models.interop.pickles import read_pickle

FILES = ("model_params.pt", "attr.pkl", "var_names.csv")
"""Tensors, settings, and a gene a line: of scArches, and of scvi-tools before 0.15."""


def read_three_files(path: Path) -> tuple[dict[str, np.ndarray], list[str], dict[str, Any]]:
    """Tensors, names of genes and attributes of the model in a folder.

    Raises:
        OpenError: the three files are not there. UnsafeFileError: one of them names more than a model needs.
        ModelFileError: they hold something else.
    """
    if not all((path / name).is_file() for name in FILES):
        raise OpenError(f"{path}: no model of scArches: wanted {', '.join(FILES)}")
    state, attributes = read_pickle(path / "model_params.pt"), read_pickle(path / "attr.pkl")
    if not isinstance(state, dict) or not isinstance(attributes, dict):
        raise ModelFileError(f"{path}: not a model that can be imported")
    tensors = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    return tensors, read_names(path / "var_names.csv"), attributes


def read_attributes(path: Path) -> dict[str, Any] | None:
    """The attributes alone, by which classes of models are told apart; None if the three files are not there.

    Raises:
        UnsafeFileError, ModelFileError: as `read_pickle`.
    """
    if not all((path / name).is_file() for name in FILES):
        return None
    attributes = read_pickle(path / "attr.pkl")
    return attributes if isinstance(attributes, dict) else None


def read_names(path: Path) -> list[str]:
    """The genes of a ``var_names.csv``: a line each, for a reader of tables would cut names at commas.

    Raises:
        ModelFileError: it is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: not text, so not a list of genes") from error
    return [line.strip() for line in lines if line.strip()]


def reason(error: Exception) -> str:
    """What is wrong, in one line: of settings that cannot be, each field and why."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False))


def load_fitting(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, which tells what does not fit in one line.

    Raises:
        ModelFileError: a tensor that is missing, not expected, or of another shape.
    """
    wanted = model.state_dict()
    if wanted.keys() != tensors.keys():
        missing, surplus = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ModelFileError(f"the weights do not fit the settings: missing {missing}, not expected {surplus}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ModelFileError(
                f"the weights do not fit the settings and the names of genes: {name} is {tuple(tensor.shape)}, "
                f"{tuple(wanted[name].shape)} was expected"
            )
    model.load_state_dict(dict(tensors))
