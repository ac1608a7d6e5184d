"""What all tests of parity share: numbers of the originals, how near is near, and the gradients of a loss."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.contracts import Batch, Step
from scarcade.engine.schema import Schema
from scarcade.models.model import AtlasModel
from tests.shared import shared

HERE = Path(__file__).parent
TOLERANCE = 1e-5
Arrays = dict[str, np.ndarray]
M = TypeVar("M", bound=AtlasModel)


@dataclass
class SharedCase(Generic[M]):
    """A model that the original trained, and cells of its three batches and of two others."""

    folder: Path
    model: M
    reference: Batch
    query: Batch

    def arrays(self, name: str) -> Arrays:
        return arrays_in(self.folder / f"{name}.npz")


def arrays_in(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def inputs() -> Arrays:
    """The cells that all models of ``shared/parity`` were given."""
    return arrays_in(shared("parity/inputs.npz"))


def made_beside(name: str) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and settings of a small model that stands beside this file."""
    with np.load(HERE / f"{name}.npz", allow_pickle=False) as file:
        values, content = file["values"], json.loads(file["json"].tobytes().decode())
    index = content["index"].items()
    return {key: values[at : at + int(np.prod(shape))].reshape(shape) for key, (at, shape) in index}, content["meta"]


def part(arrays: Arrays, prefix: str) -> Arrays:
    return {key.removeprefix(f"{prefix}/"): value for key, value in arrays.items() if key.startswith(f"{prefix}/")}


def five_batches(schema: Schema) -> Schema:
    """That of a reference of three batches with those of the query behind them."""
    assert schema.batch.values == ("b0", "b1", "b2")
    return replace(schema, batch=schema.batch.extended(["b3", "b4"]))


def near(found: Any, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Relative to the largest value of the tensor (entries near zero are rounding in both)."""
    found = found.detach().numpy() if isinstance(found, Tensor) else found
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * float(np.abs(wanted).max(initial=1e-30)))


def loss_of(model: AtlasModel, batch: Batch) -> Tensor:
    """The loss as the engine makes it, without noise."""
    losses = model.losses(batch, Step(), None)
    total = losses.minimise.mean()
    for more in (losses.penalty, losses.labelled):
        total = total if more is None else total + more.mean()
    return total


def gradients(model: AtlasModel, batch: Batch) -> dict[str, Tensor]:
    """Those of `loss_of`, by the names of our weights."""
    model.eval()
    model.zero_grad(set_to_none=True)
    torch.autograd.backward([loss_of(model, batch)])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
