"""Maximum mean discrepancy between the conditions of a batch, for all pairs of conditions in one pass.

The kernel is the sum of 19 Gaussians of Lotfollahi et al. 2020 (trVAE), the estimator the biased one. With K the
kernel between all cells of a batch, k(a, b) its mean over the cells of conditions a and b, and a graph whose edges
are the pairs that are compared,

    sum over edges (a, b) of  k(a, a) + k(b, b) - 2 k(a, b)  =  sum over all a, b of  Laplacian(a, b) k(a, b),

so every cell pair has one weight, and there is no loop over conditions. The original makes an (n, m, d, 19)
tensor for each pair of conditions; here two (B, B) matrices are all there is, and one where a compiled kernel does
it (float32). Shapes: B cells, D dimensions, C conditions that have cells.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scarcade.engine.gpu import compiles_for
from scarcade.engine.pool import run
from scarcade.models import mmd_kernel as kernel
from scarcade.models.products import times

WIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)
"""alpha in exp(-d^2 / (2 alpha)); they are summed, not averaged."""


def mmd(z_BD: Tensor, code_B: Tensor, boundary: int | None = None, n_codes: int | None = None) -> Tensor:
    """The squared MMD summed over pairs of conditions, a scalar; 0 where there is no pair.

    Args:
        z_BD: what is to be alike in all conditions.
        code_B: the condition of each cell.
        boundary: compare only conditions below it with those from it on, two cells each at least (the reference
            with the query, in scArches). None: all pairs.
        n_codes: how many conditions there are. A GPU that is told need not be asked which of them have cells.
    """
    if n_codes is not None and z_BD.device.type != "cpu":
        weight_CC, place_B = weights_of_all(code_B, n_codes, boundary, z_BD.dtype), code_B
    else:
        weight_CC, place_B = pair_weights(code_B, boundary, z_BD.dtype)
    return _way(z_BD).apply(z_BD, weight_CC, place_B)  # type: ignore[no-any-return, no-untyped-call]


def _way(z_BD: Tensor) -> "type[_Plain | _Fused]":
    if z_BD.dtype != torch.float32:
        return _Plain
    if z_BD.device.type == "cpu":
        return _Fused
    return _OnGpu if compiles_for(z_BD.device) else _Plain


def pair_weights(code_B: Tensor, boundary: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight of a pair of cells in the sum over pairs of conditions, (C, C), and the place in it of each cell."""
    present_C, place_B, n_C = torch.unique(code_B, return_inverse=True, return_counts=True)
    if boundary is None:
        edge_CC = torch.ones(len(n_C), len(n_C), dtype=dtype, device=code_B.device)
        edge_CC.fill_diagonal_(0)
    else:
        before_C, enough_C = present_C < boundary, n_C >= 2
        edge_CC = ((before_C[:, None] != before_C) & enough_C[:, None] & enough_C).to(dtype)
    laplacian_CC = torch.diag(edge_CC.sum(1)) - edge_CC
    share_C = 1.0 / n_C.to(dtype)
    return laplacian_CC * share_C[:, None] * share_C, place_B


def weights_of_all(code_B: Tensor, n_codes: int, boundary: int | None, dtype: torch.dtype) -> Tensor:
    """As `pair_weights`, of all conditions in the order of their codes, (K, K); 0 of those that have no cells."""
    code_K = torch.arange(n_codes, device=code_B.device)
    n_K = (code_B[:, None] == code_K).sum(0)
    there_K = n_K > 0
    if boundary is None:
        edge_KK = there_K[:, None] & there_K & (code_K[:, None] != code_K)
    else:
        before_K, enough_K = code_K < boundary, n_K >= 2
        edge_KK = (before_K[:, None] != before_K) & enough_K[:, None] & enough_K
    laplacian_KK = torch.diag(edge_KK.sum(1)).to(dtype) - edge_KK.to(dtype)
    share_K = 1.0 / n_K.clamp(min=1).to(dtype)
    return laplacian_KK * share_K[:, None] * share_K


class _Plain(torch.autograd.Function):
    """(z, weights (C, C), places) -> sum of weights * K; value and gradient in one pass over the 19 Gaussians."""

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, weight_CC: Tensor, place_B: Tensor) -> Tensor:
        # differences and not |a|^2 + |b|^2 - 2ab: the narrowest Gaussian sees distances of 1e-3
        distance_BB = torch.cdist(z_BD, z_BD, compute_mode="donot_use_mm_for_euclid_dist").square_()
        kernel_BB, slope_BB = torch.zeros_like(distance_BB), torch.zeros_like(distance_BB)
        for alpha in WIDTHS:
            part_BB = torch.exp(distance_BB * (-0.5 / alpha))
            kernel_BB += part_BB
            slope_BB.add_(part_BB, alpha=-0.5 / alpha)
        weight_BB = weight_CC[place_B][:, place_B]
        slope_BB.mul_(weight_BB).fill_diagonal_(0)  # a cell does not move itself
        ctx.save_for_backward(z_BD, slope_BB)
        return kernel_BB.mul_(weight_BB).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        z_BD, slope_BB = ctx.saved_tensors
        # slopes reach 5e5 between cells that lie together, and cancel: float64
        slope_BB, z = slope_BB.double(), z_BD.double()
        gradient_BD = 4.0 * (slope_BB.sum(1, keepdim=True) * z - slope_BB @ z)
        return (scale * gradient_BD).to(z_BD), None, None


class _OnGpu(_Plain):
    """The same by one kernel of Triton (`mmd_triton`)."""

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, weight_CC: Tensor, place_B: Tensor) -> Tensor:
        from scarcade.models import mmd_triton

        n_cells, n_dims = z_BD.shape
        tiles = -(-n_cells // mmd_triton.OWN), -(-n_cells // mmd_triton.OTHER)
        total = torch.empty(tiles, dtype=torch.float64, device=z_BD.device)
        slope_BB = torch.empty(n_cells, n_cells, device=z_BD.device)
        given = z_BD.T.contiguous(), weight_CC.contiguous(), place_B, _factors(z_BD.device)
        sizes = n_cells, n_dims, len(weight_CC), len(WIDTHS)
        mmd_triton.pairs[tiles](*given, *sizes, total, slope_BB, OWN=mmd_triton.OWN, OTHER=mmd_triton.OTHER)
        ctx.save_for_backward(z_BD, slope_BB)
        return total.sum().to(z_BD.dtype)


@cache
def _factors(device: torch.device) -> Tensor:
    """Of the squared distance in the exponents (W,)."""
    return torch.tensor([-0.5 / alpha for alpha in WIDTHS], device=device)


class _Fused(torch.autograd.Function):
    """As `_Plain`, compiled, each pair of cells once; the same bits on any number of threads."""

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, weight_CC: Tensor, place_B: Tensor) -> Tensor:
        n_cells = len(z_BD)
        slope_BB = torch.zeros(n_cells, n_cells)  # above the diagonal
        total_B = np.zeros(n_cells)
        factors = np.array([-0.5 / alpha for alpha in WIDTHS], np.float32)
        given = z_BD.T.contiguous().numpy(), weight_CC.numpy(), place_B.numpy(), factors, total_B, slope_BB.numpy()
        run((n_cells + 1) // 2, lambda start, stop: kernel.pairs(start, stop, *given))
        with_itself_B = weight_CC.diagonal()[place_B].double() * len(WIDTHS)
        total = 2.0 * float(total_B.sum()) + with_itself_B.sum()
        ctx.save_for_backward(z_BD, slope_BB)
        # compiled code assumes finite numbers: a latent that is not must not come out as a fine loss
        return total.to(z_BD.dtype) + 0.0 * z_BD.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        z_BD, slope_BB = ctx.saved_tensors
        above_BB, z = slope_BB.double(), z_BD.double()  # float64 as in `_Plain`
        slope_B = above_BB.sum(0) + above_BB.sum(1)
        gradient_BD = 4.0 * (slope_B[:, None] * z - times(above_BB, z) - times(above_BB.T, z))
        return (scale * gradient_BD).to(z_BD), None, None
