"""The last layer of a decoder that is trained, with its likelihood, as one function of the hidden units.

Logits, likelihood and the way back through the weights are done block by block of cells, in memory that stays in the
cache and is used again: (cells x genes) matrices are neither made anew in each step nor kept for a backward pass. Each
thread does all of this for its own cells: threads that share each product wait for each other three times a block,
which is worth while only where cells are few. All gradients are made in the forward pass, for cells of the weight that
the engine's mean gives them; for weights that differ the pass is made again. (`frozen_head` is the same for a decoder
that is not trained.)

Where it can be, in float32 on Linux, this is a job of threads that do without the interpreter (`head_crew`), and the
gradients of weights may come later (`engine.later`).

With products in bfloat16 (`engine.precision`) the weights and hidden units are rounded, and so are the gradients of the
logits; biases, softmax, likelihood and all sums stay in float32.

Shapes: B cells, G genes, H hidden units, K rows of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scarcade.engine import later
from scarcade.engine.pool import run, threads
from scarcade.engine.precision import products
from scarcade.engine.weighing import share_of_a_cell
from scarcade.models import head_crew
from scarcade.models import likelihood_kernel as kernel
from scarcade.models.head_product import Product, buffers, codes_of
from scarcade.models.layers import Codes, condition_rows
from scarcade.models.products import product_of, rows_of
from scarcade.models.sparse import Sparse

BLOCK = {torch.float32: head_crew.BLOCK, torch.bfloat16: 512}  # cells: logits of 2,000 genes are 1 and 2 MB
_WEIGHT = 7  # place of the first product's weight among the inputs of `_LogP`


@dataclass(frozen=True, slots=True)
class Logits:
    """What a last layer gives, not computed yet: ``h W^T + table[code]``; without codes the bias is (1, G)."""

    h_BH: Tensor
    weight_GH: Tensor
    table_KG: Tensor
    code_B: Tensor | None = None

    @property
    def trained(self) -> bool:
        return self.weight_GH.requires_grad

    def tensor(self) -> Tensor:
        """(B, G)."""
        rows_BG = self.table_KG[0] if self.code_B is None else rows_of(self.table_KG, self.code_B)
        return product_of(self.h_BH, self.weight_GH, rows_BG)


def logits_of(layer: nn.Module, h_BH: Tensor, codes: Codes, weight_GH: Tensor | None = None) -> Logits:
    """What `layer` (weight, bias or none, tables of conditions or none) is to give for `h_BH`.

    Args:
        weight_GH: in place of the layer's own, which may be masked.
    """
    given: Any = layer
    weight_GH = given.weight if weight_GH is None else weight_GH
    assert weight_GH is not None
    (table_KG, code_B), bias_G = condition_rows(layer, codes), given.bias
    if table_KG is None:
        table_KG = weight_GH.new_zeros(1, len(weight_GH)) if bias_G is None else bias_G[None]
    elif bias_G is not None:
        table_KG = table_KG + bias_G
    return Logits(h_BH, weight_GH, table_KG, code_B)


def head_log_likelihood(
    x: Tensor | Sparse,
    logits: Logits,
    log_library_B: Tensor,
    log_theta: Tensor,
    dropout: Logits | None,
    code_B: Tensor | None = None,
) -> Tensor:
    """log p of each cell (B,), as `FusedLikelihood` of the logits' tensors.

    Args:
        x: counts (B, G).
        log_theta: (G,), (B, G), or with `code_B` a table (K, G).
    """
    more = (None, None, None, None) if dropout is None else _parts(dropout)
    graded = torch.is_grad_enabled()
    return _LogP.apply(  # type: ignore[no-any-return, no-untyped-call]
        Sparse.of(x), log_library_B, log_theta, code_B, products(), graded, *_parts(logits), *more
    )


def _parts(logits: Logits) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return logits.h_BH, logits.weight_GH, logits.table_KG, logits.code_B


def _blocks(start: int, stop: int, kind: torch.dtype) -> list[slice]:
    """Blocks of whole chunks."""
    n_chunks = -(-(stop - start) // kernel.CHUNK)
    n_blocks = -(-(stop - start) // BLOCK[kind])
    cuts = [min(stop, start + kernel.CHUNK * (n_chunks * i // n_blocks)) for i in range(n_blocks)] + [stop]
    return [slice(a, b) for a, b in pairwise(cuts)]


class _Cells:
    """The cells of a batch with all that the kernel takes and gives of them."""

    def __init__(
        self,
        given: tuple[Sparse, Tensor, Tensor, Tensor | None],
        both: Sequence[Product],
        weight_B: Tensor,
    ) -> None:
        self.x, self.log_library_B, log_theta, code_B = given
        self.both = both
        n_cells, self.n_genes = len(self.x), self.x.n_genes
        self.theta = torch.exp(log_theta).reshape(-1, self.n_genes).contiguous()
        if code_B is not None:
            self.codes = codes_of(code_B, len(self.theta))
        else:
            self.codes = np.zeros(n_cells, np.int64) if log_theta.dim() == 1 else np.arange(n_cells)
        self.one = len(self.theta) == 1
        self.weight_B, self.each = weight_B, weight_B.numpy()
        self.found_d_theta: Tensor | None = None  # of several rows
        self.value_B, self.d_library_B = torch.empty(n_cells), torch.empty(n_cells)
        self.d_shared_theta = torch.zeros(-(-n_cells // kernel.CHUNK) if self.one else 0, self.n_genes)  # by chunk
        self.d_thetas: dict[int, Tensor] = {}  # of rows of a table: a thread's own, by its first row

    def compute(self) -> None:
        """On as many threads as torch is allowed.

        Each takes its own rows through everything, as long as that leaves it enough of them for a product to be worth
        while: it reads all weights. Of fewer each takes its own genes through the products, and its own rows through
        the likelihood, with a wait between them.
        """
        n_cells = len(self.x)
        if head_crew.can(self.both[0].kind):
            self.found_d_theta = head_crew.HeadJob(self.x, self.both).compute(
                (self.log_library_B, self.weight_B),
                (self.theta, self.codes),
                (self.value_B, self.d_library_B),
                self.d_shared_theta,
                later.now(),
            )
            return
        for product in self.both:
            product.make_room()
        if n_cells >= head_crew.CELLS * threads():
            run(n_cells, self._by_rows, chunk=kernel.CHUNK)
            return
        outs = [product.buffer(n_cells) for product in self.both]
        run(self.n_genes, partial(self._multiply_genes, outs))
        run(n_cells, partial(self._likelihood_of, outs), chunk=kernel.CHUNK)
        run(self.n_genes, partial(self._back_genes, outs))

    @torch.no_grad()  # a setting of each thread
    def _by_rows(self, start: int, stop: int) -> None:
        sums, genes = [product.of_rows(start) for product in self.both], slice(0, self.n_genes)
        for rows in _blocks(start, stop, self.both[0].kind):
            outs = [product.buffer(rows.stop - rows.start) for product in self.both]
            for product, out in zip(self.both, outs, strict=True):
                product.multiply(rows, genes, out)
            self._likelihood(rows, outs, start)
            for product, out, own in zip(self.both, outs, sums, strict=True):
                product.back(out, rows, genes, own)

    @torch.no_grad()
    def _multiply_genes(self, outs: Sequence[Tensor], start: int, stop: int) -> None:
        for product, out in zip(self.both, outs, strict=True):
            product.multiply(slice(0, len(self.x)), slice(start, stop), out)

    @torch.no_grad()
    def _likelihood_of(self, outs: Sequence[Tensor], start: int, stop: int) -> None:
        self._likelihood(slice(start, stop), [out[start:stop] for out in outs], start)

    @torch.no_grad()
    def _back_genes(self, outs: Sequence[Tensor], start: int, stop: int) -> None:
        for product, out in zip(self.both, outs, strict=True):
            product.back(out, slice(0, len(self.x)), slice(start, stop), product.of_genes(start))

    def _likelihood(self, rows: slice, outs: Sequence[Tensor], share: int) -> None:
        """Gradients of a block in the place of its products. `share` is the first row of the thread's."""
        n, first, also = rows.stop - rows.start, self.both[0], self.both[-1]
        logits = [(out if out.dtype == torch.float32 else out.view(torch.int16)).numpy() for out in outs]
        d_theta = self.d_shared_theta if self.one else buffers.rows("theta", n, self.n_genes)
        kernel.rows(
            *(0, n, rows.start // kernel.CHUNK),
            *(self.x.indptr[rows.start : rows.stop + 1], self.x.genes, self.x.values),
            *(logits[0], first.table.numpy(), first.codes[rows]),
            *(self.log_library_B[rows].numpy(), self.theta.numpy(), self.codes[rows]),
            logits[1] if len(logits) > 1 else np.empty((n, 0), logits[0].dtype),  # no dropout logits: no columns
            *(also.table.numpy(), also.codes[rows], self.each[rows], kernel.LOG_FACTORIAL),
            *(self.value_B[rows].numpy(), self.d_library_B[rows].numpy(), d_theta.numpy()),
            *(first.d_bias.numpy(), also.d_bias.numpy()),
        )
        if not self.one:
            if share not in self.d_thetas:
                self.d_thetas[share] = torch.zeros_like(self.theta)
            self.d_thetas[share].index_add_(0, torch.from_numpy(self.codes[rows]), d_theta)

    def d_theta(self) -> Tensor:
        if self.one:
            return self.d_shared_theta.sum(0)
        if self.found_d_theta is not None:
            return self.found_d_theta
        first, *others = (self.d_thetas[share] for share in sorted(self.d_thetas))
        for other in others:
            first += other
        return first


class _LogP(torch.autograd.Function):
    """See `head_log_likelihood`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Sparse,
        log_library_B: Tensor,
        log_theta: Tensor,
        code_B: Tensor | None,
        kind: torch.dtype,
        graded: bool,
        *parts: Tensor | None,
    ) -> Tensor:
        given = x, log_library_B.contiguous(), log_theta.contiguous(), code_B
        ctx.expected = -share_of_a_cell()  # of a log likelihood
        weight_B = torch.full((len(x),), ctx.expected)
        value_B, gradients = _pass(given, parts, kind, graded, weight_B)
        ctx.given, ctx.kind = given, kind
        ctx.save_for_backward(*parts)
        ctx.gradients = gradients
        return value_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_B: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass through a likelihood, whose gradients the first one took")
        (d_library_B, d_theta, dues, *found), ctx.gradients = ctx.gradients, None
        weights = weight_B.contiguous()
        each = weights.numpy()
        if len(each) == 0 or (each == each[0]).all():
            scale = float(each[0]) / ctx.expected if len(each) else 1.0
            if np.float32(scale) != 1:
                # in place: they were made for this pass
                for gradient in (d_theta, *(part for parts in found for part in parts if part is not None)):
                    gradient.mul_(scale)
                for due in dues:
                    due.scale = scale
        else:
            _, (_, d_theta, dues, *found) = _pass(ctx.given, ctx.saved_tensors, ctx.kind, True, weights)
        back: list[Tensor | None] = []
        for d_h_BH, d_weight_GH, d_table in found:
            back += [d_h_BH, d_weight_GH, d_table, None]
        for due, place in zip(dues, (_WEIGHT, _WEIGHT + 4), strict=False):
            due.wanted = ctx.needs_input_grad[place]
        back += [None] * (8 - len(back))
        log_theta = ctx.given[2]
        d_library_B = d_library_B * weight_B if ctx.needs_input_grad[1] else None
        return (None, d_library_B, d_theta.view_as(log_theta), None, None, None, *back)


def _pass(
    given: tuple[Sparse, Tensor, Tensor, Tensor | None],
    parts: Sequence[Tensor | None],
    kind: torch.dtype,
    graded: bool,
    weight_B: Tensor,
) -> tuple[Tensor, list[Any]]:
    both = [Product("logits", parts[:4], kind, graded)]
    if parts[4] is not None:
        both.append(Product("dropout", parts[4:], kind, graded))
    cells = _Cells(given, both, weight_B)
    cells.compute()
    dues = [product.due for product in both if product.due is not None]
    return cells.value_B, [cells.d_library_B, cells.d_theta(), dues, *(product.gradients() for product in both)]
