"""Made cells for the tests of models: batches without a store."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.contracts import Batch
from scarcade.engine.schema import Categories, Position, Schema


@dataclass
class DenseCounts:
    """Counts that are dense already."""

    x_BG: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.x_BG.shape[0], self.x_BG.shape[1]

    def dense(self, device: torch.device) -> Tensor:
        return self.x_BG.to(device)

    def log1p(self, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
        logs = torch.log1p(self.dense(device))
        return logs if kind == torch.float32 else logs.to(kind)

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = np.nonzero(self.x_BG.numpy())
        indptr = np.searchsorted(rows, np.arange(len(self.x_BG) + 1))
        return indptr.astype(np.int64), columns, self.x_BG.numpy()[rows, columns]


def batch_of(
    x: np.ndarray | Tensor,
    batch: np.ndarray | Tensor,
    *,
    labels: np.ndarray | None = None,
    categorical: np.ndarray | None = None,
    continuous: np.ndarray | None = None,
    size_factor: np.ndarray | None = None,
) -> Batch:
    """A batch of all the given cells, in one lane."""
    x_BG = torch.as_tensor(np.asarray(x, dtype=np.float32))
    n = len(x_BG)
    return Batch(
        counts=DenseCounts(x_BG),
        batch=torch.as_tensor(np.asarray(batch, dtype=np.int64)),
        labels=torch.as_tensor(np.full(n, -1) if labels is None else np.asarray(labels, dtype=np.int64)),
        rows=np.arange(n),
        position=Position(0, 1),
        lanes=((0, n),),
        n_global=n,
        categorical=None if categorical is None else torch.as_tensor(np.asarray(categorical, dtype=np.int64)),
        continuous=None if continuous is None else torch.as_tensor(np.asarray(continuous, dtype=np.float32)),
        size_factor=None if size_factor is None else torch.as_tensor(np.asarray(size_factor, dtype=np.float32)),
    )


def made_schema(
    n_genes: int = 30, *, batches: str = "ab", labels: str = "", categorical: tuple[str, ...] = (), continuous: int = 0
) -> Schema:
    """Genes g0, g1, ...; one category a letter."""
    return Schema(
        genes=tuple(f"g{i}" for i in range(n_genes)),
        batch=Categories("batch", tuple(batches)),
        labels=(Categories("label", tuple(labels)),) if labels else (),
        categorical=tuple(Categories(f"cat{i}", tuple(values)) for i, values in enumerate(categorical)),
        continuous=tuple(f"cont{i}" for i in range(continuous)),
    )


def made_batch(schema: Schema, n: int = 16, seed: int = 0, first_batch: int = 0) -> Batch:
    """Poisson counts with a program or two; codes drawn among the schema's (batches from `first_batch` on)."""
    rng = np.random.default_rng(seed)
    program = rng.gamma(0.5, 2.0, (3, schema.n_genes))
    x = rng.poisson(program[rng.integers(0, 3, n)] * rng.gamma(2.0, 0.5, (n, 1)))
    return batch_of(
        x,
        rng.integers(first_batch, len(schema.batch), n),
        labels=rng.integers(-1, schema.n_labels, n) if schema.n_labels else None,
        categorical=np.stack([rng.integers(0, len(c), n) for c in schema.categorical], 1)
        if schema.categorical
        else None,
        continuous=rng.normal(size=(n, len(schema.continuous))) if schema.continuous else None,
        size_factor=rng.gamma(2.0, 5.0, n) if schema.size_factor else None,
    )
