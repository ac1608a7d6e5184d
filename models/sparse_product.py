"""What a first layer sees of the counts, without their zeros, and the layer's product with it (`sparse_kernel`).

The product with W and the gradient of W take time in proportion to the counts that are there, and no (cells x genes)
matrix is made for them. For matrices that are too small or too full the dense product is faster.

Shapes: B cells, G genes, C columns beside the genes, I = G + C inputs, H units, N counts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.contracts import Counts
from scarcade.engine.pool import run
from scarcade.models import sparse_kernel as kernel
from scarcade.models.products import kind_of, times
from scarcade.models.sparse import Sparse

DENSITY = 0.25  # of counts that are there, up to which the sparse product is taken
CELLS = 64  # from which on: the weights are transposed for them
MANY = 1 << 16  # counts whose logarithms one thread takes
ALONE = 1 << 20  # multiplications up to which one thread does them


@dataclass(frozen=True, slots=True)
class SeenCounts:
    """x (B, I): a number of each count, and further columns."""

    cells: Sparse  # with values as the layer sees them
    beside_BC: Tensor | None = None

    def __post_init__(self) -> None:
        """The compiled code takes these as they are."""
        x = self.cells
        for part, kind in ((x.genes, np.int32), (x.values, np.float32)):
            if part.dtype != kind or not part.flags.c_contiguous or len(part) < x.indptr[-1]:
                raise TypeError(f"counts as {part.dtype} where {np.dtype(kind)} one behind the other are wanted")
        if self.beside_BC is not None and len(self.beside_BC) != len(x):
            raise ValueError(f"{len(self.beside_BC)} rows of further columns for {len(x)} cells")

    @property
    def n_inputs(self) -> int:
        return self.cells.n_genes + (0 if self.beside_BC is None else self.beside_BC.shape[1])

    @classmethod
    def of(cls, counts: Sparse, values_N: Tensor, beside_BC: Tensor | None = None) -> "SeenCounts":
        """`values_N` in the place of the counts."""
        return cls(replace(counts, values=values_N.numpy()), beside_BC)

    @classmethod
    def logs(cls, counts: Sparse, beside_BC: Tensor | None = None) -> "SeenCounts":
        """ln(1 + count)."""
        values, logs = counts.values, np.empty_like(counts.values)
        run(len(logs), lambda start, stop: kernel.take_logs(values[start:stop], logs[start:stop]), chunk=MANY)
        return cls(replace(counts, values=logs), beside_BC)

    def __len__(self) -> int:
        return len(self.cells)

    def dense(self) -> Tensor:
        """(B, I)."""
        x_BG = self.cells.dense(torch.from_numpy(self.cells.values))
        return x_BG if self.beside_BC is None else torch.cat([x_BG, self.beside_BC], -1)

    def times(self, weight_HI: Tensor) -> Tensor:
        """``x W^T`` (B, H)."""
        if weight_HI.shape[1] != self.n_inputs or weight_HI.dtype != torch.float32:
            raise ValueError(f"{weight_HI.dtype} weights of {weight_HI.shape[1]} inputs for {self.n_inputs}")
        out_BH, cells = torch.empty(len(self), len(weight_HI), dtype=torch.float32), self.cells
        given = cells.indptr, cells.genes, cells.values, cells.n_genes, weight_HI.contiguous().numpy(), out_BH.numpy()
        self._over(len(cells), len(weight_HI), lambda start, stop: kernel.forward(start, stop, *given))
        if self.beside_BC is not None:
            times(self.beside_BC, weight_HI[:, cells.n_genes :].T, out_BH, add=True)
        return out_BH

    def gradient(self, d_BH: Tensor) -> Tensor:
        """``d^T x`` (H, I): what comes back to the weights."""
        if len(d_BH) != len(self) or d_BH.dtype != torch.float32:
            raise ValueError(f"a {d_BH.dtype} gradient of {len(d_BH)} cells for {len(self)}")
        cells, beside_BC, d_BH = self.cells, self.beside_BC, d_BH.contiguous()
        d_weight_HI = torch.empty(d_BH.shape[1], self.n_inputs, dtype=torch.float32)
        given = cells.indptr, cells.genes, cells.values, d_BH.numpy(), d_weight_HI.numpy()
        self._over(cells.n_genes, d_BH.shape[1], lambda start, stop: kernel.backward(start, stop, *given))
        if beside_BC is not None:
            d_weight_HI[:, cells.n_genes :] = times(d_BH.T, beside_BC)
        return d_weight_HI

    def _over(self, n: int, n_units: int, compiled: Callable[[int, int], None]) -> None:
        if len(self.cells.values) * n_units < ALONE:
            compiled(0, n)
        else:
            run(n, compiled)


def dense_of(x: Tensor | SeenCounts) -> Tensor:
    """(B, I)."""
    return x.dense() if isinstance(x, SeenCounts) else x


def without_zeros(counts: Counts, x: Tensor | Sparse | None, weight_HI: Tensor) -> Sparse | None:
    """The counts for a sparse product with weights that train; None where the dense one is faster, or the only one.

    Args:
        x: the counts, where they have been taken from the batch already.
    """
    if not (torch.is_grad_enabled() and weight_HI.requires_grad and weight_HI.device.type == "cpu"):
        return None
    # in bfloat16 the dense product is as fast
    if kind_of(weight_HI) != torch.float32 or len(weight_HI) % kernel.LANES:
        return None
    cells = Sparse.of(counts) if x is None else x
    if isinstance(cells, Tensor) or len(cells) < CELLS or not cells.n_genes:
        return None
    few = len(cells.values) <= DENSITY * len(cells) * cells.n_genes
    return cells if few and cells.in_order() else None
