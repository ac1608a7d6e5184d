"""Calls a last layer's job (`head_job`) with the cells of a batch: its record, and the memory it works in.

Shapes: B cells, G genes, H hidden units, K rows of a table, T threads.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scarcade.engine import blas, crew, tiles
from scarcade.engine.addresses import address_of
from scarcade.engine.later import Later, can_wait
from scarcade.engine.pool import threads
from scarcade.models import head_job
from scarcade.models import likelihood_kernel as kernel
from scarcade.models.block_buffers import BlockBuffers
from scarcade.models.sparse import Sparse

if TYPE_CHECKING:
    from scarcade.models.head_product import Product

BLOCK = 128  # cells: logits of 2,000 genes are 1 MB
CELLS = 96  # of a thread from which on it takes them through everything by itself

_buffers = BlockBuffers()


def functions() -> tuple[int, ...] | None:
    """MKL's, as the job takes them: zeros if tiles are to take their place, None if it can have neither."""
    return (0, 0) if tiles.are_faster() else blas.functions()


def can(kind: torch.dtype) -> bool:
    """Whether the job can be done here: products of float32, on Linux, by tiles or by the MKL of torch."""
    return kind == torch.float32 and crew.can_be_had() and functions() is not None


class HeadJob:
    """The record of a batch, and the gradients that the job makes."""

    def __init__(self, x: Sparse, both: Sequence["Product"]) -> None:
        self.x, self.both = x, both
        n_cells, n_genes = len(x), x.n_genes
        self.by_cells = n_cells >= CELLS * threads()
        for one in both:  # the job takes addresses, and looks at nothing
            assert one.h_BH.shape == (n_cells, both[0].h_BH.shape[1])
            assert one.weight_GH.shape == (n_genes, both[0].h_BH.shape[1])
        self.crew = crew.crew_of(threads() if self.by_cells else max(1, min(threads(), -(-n_genes // kernel.CHUNK))))
        self.crew.wake()
        self.n_cells, self.n_genes, self.n_hidden = n_cells, n_genes, both[0].h_BH.shape[1]
        self.block = min(n_cells, BLOCK) if self.by_cells else n_cells
        self.kept: list[Any] = []

    def _at(self, array: "np.ndarray | Tensor", kind: type | None = None) -> int:
        """The address of an array, which is kept; as `kind`, one number behind the other."""
        if kind is not None:
            array = np.ascontiguousarray(array, kind)
        else:
            assert array.dtype in (torch.float32, np.float64)  # float64: `LOG_FACTORIAL` alone
        self.kept.append(array)
        return address_of(array)

    def compute(
        self,
        of_cells: tuple[Tensor, Tensor],
        theta: tuple[Tensor, np.ndarray],
        outs: tuple[Tensor, Tensor],
        d_shared_theta: Tensor,
        later: Later | None,
    ) -> Tensor:
        """Log p and its gradients, into `outs` and the products.

        Args:
            of_cells: log library, and the weight in the loss, (B,) each.
            theta: (K, G), and the row of each cell.
            outs: log p and the gradient by the log library, (B,) each.
            d_shared_theta: zeros (chunks, G), for theta of one row.
            later: where to leave the gradients of weights.

        Returns:
            The gradient by theta: `d_shared_theta`, or (K, G) if there are several rows.
        """
        job, x, n_threads = head_job, self.x, self.crew.n
        of_mkl = functions()
        assert of_mkl is not None
        graded = self.both[0].graded
        deferred = later is not None and graded and n_threads > 1 and all(can_wait(one.weight_GH) for one in self.both)
        record = np.zeros(job.SIZE, np.int64)
        record[: job.INDPTR] = (
            *(self.crew.address, n_threads, *of_mkl, self.by_cells, self.block, graded, deferred),
            *(self.n_cells, self.n_genes, self.n_hidden),
        )
        record[job.INDPTR : job.THETA] = (
            *(self._at(x.indptr, np.int64), self._at(x.genes, np.int32), self._at(x.values, np.float32)),
            *(self._at(one) for one in (*of_cells, kernel.LOG_FACTORIAL, *outs)),
        )
        n_thetas = len(theta[0]) if len(theta[0]) > 1 else 0
        d_theta_TKG = torch.zeros(n_threads, n_thetas, self.n_genes)
        room = _buffers.rows("d_theta", n_threads * self.block if n_thetas else 0, self.n_genes)
        memory = _buffers.rows("memory", n_threads, job.memory_for.py_func(self.n_genes))
        record[job.THETA : job.PRODUCTS + 1] = (
            *(self._at(theta[0]), len(theta[0]), self._at(theta[1], np.int64)),
            *(self._at(d_theta_TKG if n_thetas else d_shared_theta), self._at(room), self._at(memory), len(self.both)),
        )
        for number, product in enumerate(self.both):
            start = job.PRODUCTS + 1 + number * job.EACH
            record[start : start + job.EACH] = self._of(product)
        self.crew.begin(job.job, record, self.kept)
        if deferred:
            assert later is not None
            for product in self.both:
                product.due = later.expect(product.weight_GH, product.d_weight_GH, self.crew.join)
        else:
            self.crew.join()
        return d_theta_TKG[0] if n_thetas else d_shared_theta

    def _of(self, product: "Product") -> tuple[int, ...]:
        """The record of a product, with memory for its gradients."""
        n, n_tables, graded = self.crew.n, len(product.table), product.graded
        parts, several = (1, n) if self.by_cells else (n, 1)
        d_h_TBH = torch.empty(parts, *product.h_BH.shape) if graded else torch.empty(1, 0)
        d_table_TKG = torch.zeros(several, n_tables if graded and not product.one_row else 0, self.n_genes)
        others = _buffers.rows(f"{product.use} of others", (several - 1) * self.n_genes, self.n_hidden)
        product.d_h_BH, product.d_table_KG = d_h_TBH[0], d_table_TKG[0]
        return (
            *(self._at(product.h_BH), self._at(product.weight_GH), self._at(product.table), n_tables),
            *(self._at(product.codes, np.int64), self._at(product.d_bias), self._at(d_h_TBH)),
            *(self._at(product.d_weight_GH), self._at(others), self._at(d_table_TKG)),
            self._at(_buffers.rows(product.use, several * self.block, self.n_genes)),
        )
