"""What the readers of other tools' models share beside their pickles: names of genes, and tensors that must fit."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from scarcade.engine.errors import ModelFileError


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
