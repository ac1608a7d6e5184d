"""Counts without their zeros, as the compiled likelihood takes them.

Shapes: B cells, G genes, N counts that are not zero.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from scarcade.engine import csr
from scarcade.engine.contracts import Counts


@dataclass(frozen=True, slots=True)
class Sparse:
    """Cell b has the `values` of `genes` from ``indptr[b]`` to ``indptr[b + 1]``."""

    indptr: np.ndarray  # int64 (B + 1,)
    genes: np.ndarray  # int32 (N,)
    values: np.ndarray  # float32 (N,)
    n_genes: int

    @classmethod
    def of(cls, counts: "Counts | Tensor | Sparse") -> "Sparse":
        """The counts of a batch, or a matrix (B, G) on a CPU."""
        if isinstance(counts, Sparse):
            return counts
        if isinstance(counts, Tensor):
            cells, genes = counts.nonzero(as_tuple=True)  # what is not a number is not zero
            lengths = torch.bincount(cells, minlength=len(counts))
            values = counts[cells, genes]
            indptr, found, n_genes = np.concatenate([[0], lengths.cumsum(0).numpy()]), genes.numpy(), counts.shape[1]
            return cls(indptr, found.astype(np.int32), values.numpy().astype(np.float32, copy=False), n_genes)
        indptr, found, data = counts.csr()
        return cls(indptr, found.astype(np.int32, copy=False), data.astype(np.float32, copy=False), counts.shape[1])

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def of_each(self, rows_B: Tensor) -> Tensor:
        """A number of each cell, for each of its counts (N,)."""
        return torch.repeat_interleave(rows_B, torch.from_numpy(np.diff(self.indptr)), output_size=len(self.values))

    def dense(self, values_N: Tensor, room: int = 0) -> Tensor:
        """float32 (B, G + room) with `values_N` in the place of the counts; zeros elsewhere."""
        out = torch.empty(len(self), self.n_genes + room)
        _scatter(self.indptr, self.genes, values_N.numpy(), out.numpy())
        return out

    def in_order(self) -> bool:
        """Whether the genes of each cell are genes, and ascend."""
        return bool(csr.check_rows(self.indptr, self.genes, self.n_genes)[0] == csr.OK)

    def sums(self) -> Tensor:
        """The library of each cell, (B,)."""
        sums_B = torch.empty(len(self))
        _sum(self.indptr, self.values, sums_B.numpy())
        return sums_B


@njit(nogil=True, cache=True)
def _scatter(indptr, genes, values, out) -> None:  # type: ignore[no-untyped-def]
    for b in range(len(out)):
        row = out[b]
        row[:] = 0.0
        for k in range(indptr[b], indptr[b + 1]):
            row[np.uintp(genes[np.uintp(k)])] = values[np.uintp(k)]  # unsigned: no check for negative places


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _sum(indptr, values, sums_B) -> None:  # type: ignore[no-untyped-def]
    for b in range(len(sums_B)):
        of_cell = values[indptr[b] : indptr[b + 1]]
        total = np.float32(0.0)
        for k in range(len(of_cell)):
            total += of_cell[np.uintp(k)]  # unsigned, or the check for negative places forbids vectors
        sums_B[b] = total


def seen(counts: Counts, device: torch.device) -> Tensor | Sparse:
    """The counts of a batch for whoever wants no more than their sums: without their zeros where that costs less."""
    return Sparse.of(counts) if device.type == "cpu" else counts.dense(device)


def totals(counts: Tensor | Sparse) -> Tensor:
    """The library of each cell, (B,)."""
    return counts.sums() if isinstance(counts, Sparse) else counts.sum(-1)
