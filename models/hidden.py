"""A hidden layer as one function: product, rows of conditions, norm, ReLU (leaky or not), dropout.

On a CPU in float32 it is compiled (`hidden_kernel`) and one node of torch's graph where it would be six, each of which
costs as much as its arithmetic in a batch of a hundred cells. Elsewhere, and for a layer that has both norms, the same
is done by torch's operations (`layers`); the two agree to 1e-5 (tests/models/test_hidden.py).

Shapes: B cells, I inputs, H units, K rows of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scarcade.engine.pool import run
from scarcade.models import hidden_kernel as kernel
from scarcade.models.head_product import codes_of
from scarcade.models.products import kind_of, rows_times, times
from scarcade.models.sparse_product import SeenCounts

LARGE = 1 << 18  # units of all cells from which on threads share them: waking one costs a tenth of a ms
LAYER_EPS = 1e-5  # torch's layer norm
_NO_UNITS, _NO_TABLE, _NO_CODES = np.empty(0, np.float32), np.empty((0, 0), np.float32), np.empty(0, np.int64)


class RunningNorm(Protocol):
    """Batch norm as `layers.BatchNorm` has it."""

    weight: Any
    bias: Any
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    training: bool
    EPS: float


@dataclass(frozen=True, slots=True)
class After:
    """What comes after the product."""

    norm: RunningNorm | None  # batch norm
    layer_norm: bool  # of each cell, without weights
    slope: float  # of the activation below zero; 0: ReLU
    kept_from: float = 0.0  # dropout: entries whose uniform number is below are dropped
    uniform_BH: Tensor | None = None

    def is_compiled(self, weight: Tensor) -> bool:
        """Whether `hidden` can do it: the tests' float64, GPUs and two norms in one layer are left to torch."""
        both = self.norm is not None and self.layer_norm
        return weight.device.type == "cpu" and weight.dtype == torch.float32 and not both


def hidden(
    x_BI: Tensor | SeenCounts | None,
    weight_HI: Tensor,
    bias_H: Tensor | None,
    table_KH: Tensor | None,
    code_B: Tensor | None,
    product_BH: Tensor | None,
    after: After,
) -> Tensor:
    """The units (B, H) of ``x W^T + bias + table[code]``, where ``x W^T`` may be known already (`product_BH`).

    Args:
        table_KH: rows of conditions, with the row of each cell; both or neither.

    Raises:
        IndexError: a code has no row.
    """
    norm = after.norm
    both = (None, None) if norm is None else (norm.weight, norm.bias)
    return _Hidden.apply(x_BI, weight_HI, bias_H, table_KH, code_B, product_BH, *both, after)  # type: ignore[no-any-return, no-untyped-call]


class _Hidden(torch.autograd.Function):
    """See `hidden`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BI: Tensor | SeenCounts | None,
        weight_HI: Tensor,
        bias_H: Tensor | None,
        table_KH: Tensor | None,
        code_B: Tensor | None,
        product_BH: Tensor | None,
        weight_H: Tensor | None,
        shift_H: Tensor | None,
        after: After,
    ) -> Tensor:
        ctx.seen = None
        if product_BH is not None:
            z_BH = product_BH.clone(memory_format=torch.contiguous_format)
        elif isinstance(x_BI, SeenCounts):
            z_BH = x_BI.times(weight_HI)
            ctx.seen, x_BI = x_BI, None
        else:
            assert x_BI is not None
            kind = kind_of(weight_HI)
            if kind == torch.float32:
                z_BH = rows_times(x_BI, weight_HI.T)
            else:
                x_BI, weight_HI = x_BI.to(kind), weight_HI.to(kind)
                z_BH = times(x_BI, weight_HI.T).float()
        ctx.save_for_backward(x_BI, weight_HI)
        cells = ctx.cells = _Cells(z_BH, bias_H, table_KH, code_B, shift_H, after)
        return cells.forward(weight_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BH: Tensor) -> tuple[Tensor | None, ...]:
        x_BI, weight_HI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_table, _, wants_product, wants_norm, *_ = ctx.needs_input_grad
        # what comes in may be another's, too
        d_BH = d_BH.clone(memory_format=torch.contiguous_format)
        d_norm_2H, d_bias_H, d_table_KH = ctx.cells.backward(d_BH, wants_bias, wants_table)
        d_x_BI = d_weight_HI = None
        if ctx.seen is not None:
            d_weight_HI = ctx.seen.gradient(d_BH) if wants_weight else None
        elif x_BI is not None:
            given = d_BH if x_BI.dtype == torch.float32 else d_BH.to(x_BI.dtype)
            d_x_BI = rows_times(given, weight_HI).float() if wants_x else None
            d_weight_HI = times(given.T, x_BI).float() if wants_weight else None
        d_weight_H, d_shift_H = d_norm_2H if wants_norm else (None, None)
        d_product_BH = d_BH if wants_product else None
        return d_x_BI, d_weight_HI, d_bias_H, d_table_KH, None, d_product_BH, d_weight_H, d_shift_H, None


class _Cells:
    """What comes after the product, for the cells of a batch."""

    def __init__(
        self,
        z_BH: Tensor,
        bias_H: Tensor | None,
        table_KH: Tensor | None,
        code_B: Tensor | None,
        shift_H: Tensor | None,
        after: After,
    ) -> None:
        self.z_BH, self.after = z_BH.numpy(), after
        self.bias_H = _NO_UNITS if bias_H is None else bias_H.numpy()
        self.table_KH, self.code_B = _NO_TABLE, _NO_CODES
        if table_KH is not None:
            assert code_B is not None
            self.table_KH, self.code_B = table_KH.contiguous().numpy(), codes_of(code_B, len(table_KH))
        self.shift_H = _NO_UNITS if shift_H is None else shift_H.numpy()
        u_BH = after.uniform_BH
        uniform_BH = np.empty((len(z_BH), 0), np.float32) if u_BH is None else u_BH.numpy()
        self.activation = np.float32(after.slope), uniform_BH, np.float32(after.kept_from)
        self.mode = kernel.NONE
        if after.norm is not None:
            self.mode = kernel.BATCH if after.norm.training and len(z_BH) > 1 else kernel.RUNNING

    def forward(self, weight_H: Tensor | None) -> Tensor:
        """The units."""
        z_BH, norm, added = self.z_BH, self.after.norm, (self.bias_H, self.table_KH, self.code_B)
        y_BH = torch.empty(z_BH.shape)
        if self.after.layer_norm:
            self.kept = np.empty((2, len(z_BH)), np.float32)
            given: tuple[Any, ...] = (*added, LAYER_EPS, *self.activation, z_BH, self.kept, y_BH.numpy())
            self._over(len(z_BH), kernel.forward_of_cells, given)
            return y_BH
        self.kept = np.empty((3, z_BH.shape[1]), np.float32)
        learnt: tuple[Any, ...] = (_NO_UNITS, self.shift_H, (_NO_UNITS, _NO_UNITS), np.float32(0), 0.0)
        if norm is not None:
            assert weight_H is not None
            running = norm.running_mean.numpy(), norm.running_var.numpy()
            learnt = (weight_H.numpy(), self.shift_H, running, np.float32(norm.momentum), norm.EPS)
        given = (*added, *learnt, self.mode, *self.activation, z_BH, self.kept, y_BH.numpy())
        self._over(z_BH.shape[1], kernel.forward, given)
        return y_BH

    def backward(
        self, d_BH: Tensor, wants_bias: bool, wants_table: bool
    ) -> tuple[Sequence[Tensor | None], Tensor | None, Tensor | None]:
        """Makes `d_BH` that of z; the gradients of batch norm's weight and bias, of the bias and of the rows."""
        z_BH, d = self.z_BH, d_BH.numpy()
        d_bias_H = torch.zeros(self.bias_H.shape) if wants_bias else None
        d_table_KH = torch.zeros(self.table_KH.shape) if wants_table else None
        sums = (
            _NO_UNITS if d_bias_H is None else d_bias_H.numpy(),
            _NO_TABLE if d_table_KH is None else d_table_KH.numpy(),
        )
        if self.after.layer_norm:
            given: tuple[Any, ...] = (*self.activation, z_BH, self.kept, d)
            self._over(len(z_BH), kernel.backward_of_cells, given)
            kernel.add_up(d, self.code_B, *sums)
            return (None, None), d_bias_H, d_table_KH
        d_norm_2H = torch.empty(2, 0 if self.mode == kernel.NONE else z_BH.shape[1])
        given = (self.shift_H, self.kept, self.mode, *self.activation, z_BH, self.code_B, d, d_norm_2H.numpy(), *sums)
        self._over(z_BH.shape[1], kernel.backward, given)
        return d_norm_2H.unbind(), d_bias_H, d_table_KH

    def _over(self, n: int, compiled: Any, given: tuple[Any, ...]) -> None:
        """Call it for all units, or cells, on threads if that is worth while."""
        if self.z_BH.size < LARGE:
            compiled(0, n, *given)
        else:
            run(n, lambda start, stop: compiled(start, stop, *given))
