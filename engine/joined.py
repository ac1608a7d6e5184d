"""One batch out of the batches of several queries, for a step that trains all of them at once.

The cells of a query stay together and in their order, so what is summed over them is summed as if they were alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.contracts import Batch, Counts

LEAST = 32
"""Rows of a joined batch, at least.

A matrix product of a few rows may be computed by other code than one of many, with other last bits; from 16 rows on
a row's result did not depend on the others in any product of at least 12 columns that was tried (MKL, AVX-512 and
Zen, 1 and 2 threads, float32). So a step of few cells is filled up, and a query comes out the same, to the last bit, in
any company.
"""


_BESIDE = ("categorical", "continuous", "proteins", "proteins_measured", "size_factor")


class JoinedCounts:
    """Counts of several batches one behind the other (`scarcade.engine.contracts.Counts`).

    `buffer` is where they are made dense on a CPU: valid until the next batch that uses it.
    """

    def __init__(self, parts: Sequence[Counts], buffer: "DenseBuffer") -> None:
        self._parts, self._buffer = parts, buffer

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self._parts), self._parts[0].shape[1]

    def dense(self, device: torch.device) -> Tensor:
        """float32 (B, G)."""
        if device.type != "cpu":
            return torch.cat([part.dense(device) for part in self._parts])
        return self._buffer.filled(self._parts)

    def log1p(self, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
        """ln(1 + count), (B, G)."""
        logs = torch.log1p(self.dense(device))
        return logs if kind == torch.float32 else logs.to(kind)

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indptr int64 (B + 1,), gene index, value)."""
        indptrs, indices, data = zip(*(part.csr() for part in self._parts), strict=True)
        indptr = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(one) for one in indptrs]))])
        return indptr, np.concatenate(indices), np.concatenate(data)


class DenseBuffer:
    """Memory for the dense counts of one joined batch, used again for the next."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    def filled(self, parts: Sequence[Counts]) -> Tensor:
        """The counts of `parts`, one behind the other, (B, G)."""
        n, cpu = sum(part.shape[0] for part in parts), torch.device("cpu")
        start = 0
        for part in parts:
            dense = part.dense(cpu)
            have = self._rows
            if have is None or len(have) < n or have.shape[1] != dense.shape[1] or have.dtype != dense.dtype:
                have = self._rows = torch.empty(n, dense.shape[1], dtype=dense.dtype)
            have[start : start + len(dense)] = dense
            start += len(dense)
        assert self._rows is not None
        return self._rows[:n]


class Repeated:
    """The first cell of some counts, `n` times: what a batch is filled up with."""

    def __init__(self, counts: Counts, n: int) -> None:
        self._counts, self._n = counts, n

    @property
    def shape(self) -> tuple[int, int]:
        return self._n, self._counts.shape[1]

    def dense(self, device: torch.device) -> Tensor:
        return self._counts.dense(device)[:1].repeat(self._n, 1)

    def log1p(self, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
        logs = torch.log1p(self.dense(device))
        return logs if kind == torch.float32 else logs.to(kind)

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indptr, indices, data = self._counts.csr()
        n = int(indptr[1])
        return np.arange(self._n + 1) * n, np.tile(indices[:n], self._n), np.tile(data[:n], self._n)


def joined(batches: Sequence[Batch], buffer: DenseBuffer, *, least: int = LEAST) -> Batch:
    """The cells of `batches` as one batch; `Batch.queries` tells how many are of each.

    Fewer than `least` cells are filled up with copies of the first one, as cells of a last query, whose codes are all
    0. Labelled cells that come beside a batch are not taken.
    """
    n = sum(len(batch) for batch in batches)
    if n < least:
        batches = [*batches, _filling(batches[0], least - n)]

    def together(name: str) -> Any:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)

    return Batch(
        counts=JoinedCounts([one.counts for one in batches], buffer),
        batch=together("batch"),
        labels=together("labels"),
        rows=np.concatenate([one.rows for one in batches]),
        position=batches[0].position,
        lanes=tuple(lane for one in batches for lane in one.lanes),
        n_global=sum(len(one) for one in batches),
        queries=tuple(len(one) for one in batches),
        known={name: torch.cat([one.known[name] for one in batches]) for name in batches[0].known},
        **{name: together(name) for name in _BESIDE},
    )


def _filling(batch: Batch, n: int) -> Batch:
    def first(value: Tensor | None) -> Any:
        return None if value is None else value[:1].repeat(n, *[1] * (value.dim() - 1))

    zeros = torch.zeros(n, dtype=torch.int64, device=batch.batch.device)
    codes = None if batch.categorical is None else torch.zeros_like(batch.categorical[:1]).repeat(n, 1)
    return replace(
        batch,
        counts=Repeated(batch.counts, n),
        batch=zeros,
        labels=torch.full_like(zeros, -1),
        rows=np.repeat(batch.rows[:1], n),
        lanes=((0, n),),
        labelled=None,
        known={name: first(value) for name, value in batch.known.items()},
        **{name: first(getattr(batch, name)) for name in _BESIDE if name != "categorical"} | {"categorical": codes},
    )
