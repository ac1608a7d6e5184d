"""The squared error of a last layer, as one function of the hidden units.

What is decoded is needed for nothing but its distance to the data: it is made, compared and weighed in one piece of
memory, compiled on a CPU in float32, where torch makes six (cells x genes) matrices. Elsewhere torch does it.

Shapes: B cells, G genes, H hidden units.
"""

# compiled with: 1b8e897c26b8

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from scarcade.engine.vector_math import wide
from scarcade.models.products import kind_of, product_of, times


def mean_squared_error(x_BG: Tensor, h_BH: Tensor, weight_GH: Tensor, bias_G: Tensor) -> Tensor:
    """The mean over genes of ``(h W^T + bias - x)^2``, (B,). x is data: it has no gradient."""
    if weight_GH.device.type == "cpu" and weight_GH.dtype == x_BG.dtype == torch.float32:
        return _Error.apply(x_BG, h_BH, weight_GH, bias_G)  # type: ignore[no-any-return, no-untyped-call]
    return (product_of(h_BH, weight_GH, bias_G) - x_BG).square().mean(-1)


class _Error(torch.autograd.Function):
    """See `mean_squared_error`."""

    @staticmethod
    def forward(ctx: Any, x_BG: Tensor, h_BH: Tensor, weight_GH: Tensor, bias_G: Tensor) -> Tensor:
        kind = kind_of(weight_GH)
        h_BH, weight_GH = h_BH.to(kind), weight_GH.to(kind)
        rest_BG = times(h_BH, weight_GH.T).float()
        error_B = torch.empty(len(rest_BG))
        _compare(rest_BG.numpy(), bias_G.numpy(), x_BG.numpy(), error_B.numpy())
        ctx.save_for_backward(h_BH, weight_GH)
        ctx.rest_BG = rest_BG
        return error_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_B: Tensor) -> tuple[Tensor | None, ...]:
        h_BH, weight_GH = ctx.saved_tensors
        d_BG = torch.empty_like(ctx.rest_BG)  # what is kept stays, for another pass back
        d_bias_G = torch.zeros(d_BG.shape[1])
        _weigh(ctx.rest_BG.numpy(), weight_B.contiguous().numpy(), d_BG.numpy(), d_bias_G.numpy())
        given_BG = d_BG.to(h_BH.dtype)
        d_h_BH = times(given_BG, weight_GH).float() if ctx.needs_input_grad[1] else None
        d_weight_GH = times(given_BG.T, h_BH).float() if ctx.needs_input_grad[2] else None
        return None, d_h_BH, d_weight_GH, d_bias_G


@njit(forceinline=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _compare_cell(rest_G, bias_G, x_G) -> np.float32:  # type: ignore[no-untyped-def]
    wide()
    total = np.float32(0.0)
    for g in range(len(rest_G)):
        rest_G[g] = rest_G[g] + bias_G[g] - x_G[g]
    for g in range(len(rest_G)):  # a loop that sums writes nothing: see `vector_math.apart`
        total += rest_G[g] * rest_G[g]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _compare(rest_BG, bias_G, x_BG, error_B) -> None:  # type: ignore[no-untyped-def]
    """What is left of a product beside the data, in its place, and its mean square."""
    for b in range(len(rest_BG)):
        error_B[b] = _compare_cell(rest_BG[b], bias_G, x_BG[b]) / np.float32(rest_BG.shape[1])


@njit(forceinline=True, error_model="numpy", fastmath={"contract"})
def _weigh_cell(rest_G, weight, d_G, d_bias_G) -> None:  # type: ignore[no-untyped-def]
    wide()
    for g in range(len(rest_G)):
        d = weight * rest_G[g]
        d_G[g] = d
        d_bias_G[g] += d


@njit(nogil=True, cache=True, error_model="numpy")
def _weigh(rest_BG, weight_B, d_BG, d_bias_G) -> None:  # type: ignore[no-untyped-def]
    """The gradient by the product, and by the bias."""
    for b in range(len(rest_BG)):
        _weigh_cell(rest_BG[b], np.float32(2.0) * weight_B[b] / np.float32(rest_BG.shape[1]), d_BG[b], d_bias_G)
