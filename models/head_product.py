"""A product of a last layer over all genes, and what comes back through it, for threads that share the work.

A thread has some of the cells or some of the genes. What it sums over the others it keeps for itself, and all of it is
added up in the end, in the same order whoever was first.

Shapes: B cells, G genes, H hidden units, K rows of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.later import Due
from scarcade.models import likelihood_kernel as kernel
from scarcade.models.block_buffers import BlockBuffers

buffers = BlockBuffers()


class Product:
    """One of the products ``h W^T``, and the gradients that come back through it."""

    def __init__(self, use: str, parts: Sequence[Tensor | None], kind: torch.dtype, graded: bool) -> None:
        h_BH, weight_GH, table_KG, code_B = parts
        assert h_BH is not None
        assert weight_GH is not None
        assert table_KG is not None
        self.use, self.kind, self.graded = use, kind, graded
        self.n_genes = len(weight_GH)
        self.h_BH, self.weight_GH = h_BH.to(kind), weight_GH.to(kind)
        self.table, self.code_B = table_KG.contiguous(), code_B
        n_cells = len(h_BH)
        self.codes = np.zeros(n_cells, np.int64) if code_B is None else codes_of(code_B, len(table_KG))
        self.one_row = len(table_KG) == 1
        self.d_bias = torch.zeros(-(-n_cells // kernel.CHUNK) if self.one_row else 0, self.n_genes)  # by chunk
        self.d_weight_GH = torch.empty(weight_GH.shape if graded else (0,))
        self.d_h_BH = self.d_table_KG = torch.empty(0)  # until there is room
        self.d_h_of_others: dict[int, Tensor] = {}  # parts of d_h_BH that other threads summed, by their first gene
        self.d_of_others: dict[int, tuple[Tensor, Tensor]] = {}  # parts of d_weight_GH and d_table_KG, by the first row
        self.due: Due | None = None  # d_weight_GH, if it is still being made

    def make_room(self) -> None:
        """For the gradients by hidden units and table."""
        self.d_h_BH = torch.empty(self.h_BH.shape if self.graded else (0,))
        self.d_table_KG = torch.zeros(len(self.table) if self.graded and not self.one_row else 0, self.n_genes)

    def buffer(self, n: int) -> Tensor:
        """(n, G) of the calling thread."""
        return buffers.rows(self.use, n, self.n_genes, self.kind)

    def multiply(self, rows: slice, genes: slice, out_BG: Tensor) -> None:
        """The product of some rows and genes, to where the gradient is then found."""
        torch.mm(self.h_BH[rows], self.weight_GH[genes].T, out=out_BG[:, genes])

    def back(self, d_BG: Tensor, rows: slice, genes: slice, sums: "Sums") -> None:
        """Add to `sums` what comes back from some rows and genes."""
        if not self.graded:
            return
        d_BG, weight_GH, d_weight_GH = d_BG[:, genes], self.weight_GH[genes], sums.d_weight_GH[genes]
        h_BH = self.h_BH[rows]
        if self.kind != torch.float32:
            sums.d_h_BH[rows] = d_BG @ weight_GH
            d_weight_GH.copy_(d_weight_GH + d_BG.T @ h_BH if sums.began else d_BG.T @ h_BH)
        else:
            torch.mm(d_BG, weight_GH, out=sums.d_h_BH[rows])
            if sums.began:
                d_weight_GH.addmm_(d_BG.T, h_BH)
            else:
                torch.mm(d_BG.T, h_BH, out=d_weight_GH)
        sums.began = True
        if not self.one_row:
            assert self.code_B is not None
            sums.d_table_KG[:, genes].index_add_(0, self.code_B[rows], d_BG.float())

    def of_rows(self, start: int) -> "Sums":
        """Sums for the thread of the rows from `start` on: the first takes those of the product."""
        if start == 0:
            return Sums(self.d_h_BH, self.d_weight_GH, self.d_table_KG)
        own = self.d_of_others[start] = torch.empty_like(self.d_weight_GH), torch.zeros_like(self.d_table_KG)
        return Sums(self.d_h_BH, *own)

    def of_genes(self, start: int) -> "Sums":
        """The same for the thread of the genes from `start` on."""
        if start == 0:
            return Sums(self.d_h_BH, self.d_weight_GH, self.d_table_KG)
        own = self.d_h_of_others[start] = torch.empty_like(self.d_h_BH)
        return Sums(own, self.d_weight_GH, self.d_table_KG)

    def gradients(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """By hidden units, weights (none if they are due), and table."""
        for start in sorted(self.d_h_of_others):
            self.d_h_BH += self.d_h_of_others[start]
        for start in sorted(self.d_of_others):
            self.d_weight_GH += self.d_of_others[start][0]
            self.d_table_KG += self.d_of_others[start][1]
        d_table_KG = self.d_bias.sum(0, keepdim=True) if self.one_row else self.d_table_KG
        return self.d_h_BH, self.d_weight_GH if self.graded and self.due is None else None, d_table_KG


@dataclass
class Sums:
    """Where a thread adds up what comes back through a product."""

    d_h_BH: Tensor
    d_weight_GH: Tensor
    d_table_KG: Tensor
    began: bool = False


def codes_of(code_B: Tensor, n_rows: int) -> np.ndarray:
    """The codes of cells in a table of `n_rows`, as the kernels take them, which do not look.

    Raises:
        IndexError: one has no row.
    """
    codes = np.ascontiguousarray(code_B.numpy())  # those of one of several covariates are a column
    if len(codes) and not (codes.min() >= 0 and codes.max() < n_rows):
        raise IndexError(f"codes {codes.min()} to {codes.max()} of a table with {n_rows} rows")
    return codes
