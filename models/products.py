"""Products with weights, the large ones in the kind of number that is asked for (`engine.precision`); rows of tables.

A row of a product in float32 has the same bits whatever the other rows are, so that a query is mapped alike in any
company (decision 008). MKL keeps to that from 16 rows on, but on AMD's Zen not in products with fewer than 12 columns,
which are the dimensions of many a latent: those get columns of zeros (`rows_times`).

Shapes: B cells, I inputs, H outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from scarcade.engine.pool import threads
from scarcade.engine.precision import products

NARROW = 12  # columns that a product has at least
FEW = 1 << 26  # rows of a table times cells, up to which a GPU takes a product with ones for the way back
ALONE = 1 << 21  # multiplications of a product up to which one thread computes it
WIDE = 1 << 16  # weights from which on a product is a large one: those over all genes, and between wide layers


def times(left_NI: Tensor, right_IM: Tensor, out_NM: Tensor | None = None, *, add: bool = False) -> Tensor:
    """``torch.mm``, or with `add` ``addmm_``; on a CPU a small product on this thread alone (`engine.pool.alone`)."""
    own = torch.get_num_threads()
    small = left_NI.shape[0] * left_NI.shape[1] * right_IM.shape[1] <= ALONE
    wanted = own if left_NI.device.type != "cpu" else 1 if small else threads()
    if wanted != own:  # without a context manager, which costs a third of a small product
        torch.set_num_threads(wanted)
    try:
        if out_NM is None:
            return torch.mm(left_NI, right_IM)
        return out_NM.addmm_(left_NI, right_IM) if add else torch.mm(left_NI, right_IM, out=out_NM)
    finally:
        if wanted != own:
            torch.set_num_threads(own)


def kind_of(weight_HI: Tensor) -> torch.dtype:
    """In which kind of number a product with these weights is computed."""
    return products() if weight_HI.numel() >= WIDE and weight_HI.dtype == torch.float32 else weight_HI.dtype


def product_of(x_BI: Tensor, weight_HI: Tensor, plus: Tensor | None = None) -> Tensor:
    """``x W^T + plus`` (B, H); a large product in the kind of number that is asked for, whatever the layer.

    Args:
        x_BI: may be of that kind already.
        plus: (H,) or (B, H).
    """
    kind = kind_of(weight_HI)
    if kind != weight_HI.dtype:
        product_BH = F.linear(x_BI.to(kind), weight_HI.to(kind)).to(weight_HI.dtype)
        return product_BH if plus is None else product_BH + plus
    # by facts of the weights alone: whoever is beside a cell must not choose how its row is computed
    odd = min(weight_HI.shape) < NARROW or weight_HI.numel() >= WIDE
    if x_BI.dim() == 2 and odd and weight_HI.device.type == "cpu":
        return _Product.apply(x_BI, weight_HI, plus)  # type: ignore[no-any-return, no-untyped-call]
    return F.linear(x_BI, weight_HI, plus) if plus is None or plus.dim() == 1 else torch.addmm(plus, x_BI, weight_HI.T)


def rows_of(table_KH: Tensor, code_B: Tensor) -> Tensor:
    """The row of each cell, (B, H). On a GPU the gradients of a row are added up by a product with ones.

    (torch sorts the codes there, by a dozen kernels that take longer than the rest of a small layer.)
    """
    if table_KH.device.type == "cuda" and table_KH.numel() and len(table_KH) * len(code_B) <= FEW:
        return _Rows.apply(table_KH, code_B)  # type: ignore[no-any-return, no-untyped-call]
    return F.embedding(code_B, table_KH)


def added_by_code(d_BH: Tensor, code_B: Tensor, n_rows: int) -> Tensor:
    """(K, H): the sum of the rows of each code."""
    is_of_BK = code_B[:, None] == torch.arange(n_rows, device=code_B.device)
    return is_of_BK.to(d_BH.dtype).T @ d_BH


class _Rows(torch.autograd.Function):
    """See `rows_of`."""

    @staticmethod
    def forward(ctx: Any, table_KH: Tensor, code_B: Tensor) -> Tensor:
        ctx.save_for_backward(code_B)
        ctx.n_rows = len(table_KH)
        return table_KH.index_select(0, code_B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BH: Tensor) -> tuple[Tensor, None]:
        (code_B,) = ctx.saved_tensors
        return added_by_code(d_BH, code_B, ctx.n_rows), None


def rows_times(x_BI: Tensor, right_IH: Tensor) -> Tensor:
    """``x R`` (B, H), contiguous; in float32 on a CPU each row with the same bits whatever the others are."""
    n_columns = right_IH.shape[1]
    if n_columns >= NARROW or right_IH.device.type != "cpu":
        return times(x_BI, right_IH)
    return times(x_BI, F.pad(right_IH, (0, NARROW - n_columns)))[:, :n_columns].contiguous()


def rows_times_into(out_BH: Tensor, x_BI: Tensor, right_IH: Tensor, *, add: bool = False) -> None:
    """Put `rows_times` into `out_BH`, or add it."""
    if right_IH.shape[1] < NARROW:
        found_BH = rows_times(x_BI, right_IH)
        out_BH.copy_(out_BH + found_BH if add else found_BH)
    else:
        times(x_BI, right_IH, out_BH, add=add)


class _Product(torch.autograd.Function):
    """`product_of` on a CPU, with few inputs or outputs, or with many weights; torch's own is as good between."""

    @staticmethod
    def forward(ctx: Any, x_BI: Tensor, weight_HI: Tensor, plus: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BI, weight_HI)
        ctx.shape = None if plus is None else plus.shape
        product_BH = rows_times(x_BI, weight_HI.T)
        return product_BH if plus is None else product_BH.add_(plus)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BH: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_BI, weight_HI = ctx.saved_tensors
        wants_x, wants_weight, wants_plus = ctx.needs_input_grad
        return (
            rows_times(d_BH, weight_HI) if wants_x else None,
            times(d_BH.T, x_BI) if wants_weight else None,
            d_BH.sum_to_size(ctx.shape) if wants_plus else None,
        )
