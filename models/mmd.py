"""Maximum mean discrepancy between the conditions of a batch, for all pairs of conditions in one pass.

The kernel is the sum of 19 Gaussians of Lotfollahi et al. 2020 (trVAE), the estimator the biased one. With K the
kernel between all cells of a batch, k(a, b) its mean over the cells of conditions a and b, and a graph whose edges
are the pairs that are compared,

    sum over edges (a, b) of  k(a, a) + k(b, b) - 2 k(a, b)  =  sum over all a, b of  Laplacian(a, b) k(a, b),

so every cell pair has one weight, and there is no loop over conditions. The original makes an (n, m, d, 19)
tensor for each pair of conditions; here two (B, B) matrices are all there is. Shapes: B cells, D dimensions,
C conditions that have cells.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)
"""alpha in exp(-d^2 / (2 alpha)); they are summed, not averaged."""


def mmd(z_BD: Tensor, code_B: Tensor, boundary: int | None = None) -> Tensor:
    """The squared MMD summed over pairs of conditions, a scalar; 0 where there is no pair.

    Args:
        z_BD: what is to be alike in all conditions.
        code_B: the condition of each cell.
        boundary: compare only conditions below it with those from it on, two cells each at least (the reference
            with the query, in scArches). None: all pairs.
    """
    weight_BB = pair_weights(code_B, boundary, z_BD.dtype)
    return _WeightedKernel.apply(z_BD, weight_BB)  # type: ignore[no-any-return, no-untyped-call]


def pair_weights(code_B: Tensor, boundary: int | None, dtype: torch.dtype) -> Tensor:
    """The weight of each pair of cells in the sum over pairs of conditions, (B, B)."""
    present_C, place_B, n_C = torch.unique(code_B, return_inverse=True, return_counts=True)
    if boundary is None:
        edge_CC = torch.ones(len(n_C), len(n_C), dtype=dtype, device=code_B.device)
        edge_CC.fill_diagonal_(0)
    else:
        before_C, enough_C = present_C < boundary, n_C >= 2
        edge_CC = ((before_C[:, None] != before_C) & enough_C[:, None] & enough_C).to(dtype)
    laplacian_CC = torch.diag(edge_CC.sum(1)) - edge_CC
    share_C = 1.0 / n_C.to(dtype)
    weight_BB: Tensor = (laplacian_CC * share_C[:, None] * share_C)[place_B][:, place_B]
    return weight_BB


class _WeightedKernel(torch.autograd.Function):
    """(z, weights (B, B)) -> sum of weights * K; value and gradient in one pass over the 19 Gaussians."""

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, weight_BB: Tensor) -> Tensor:
        # differences and not |a|^2 + |b|^2 - 2ab: the narrowest Gaussian sees distances of 1e-3
        distance_BB = torch.cdist(z_BD, z_BD, compute_mode="donot_use_mm_for_euclid_dist").square_()
        kernel_BB, slope_BB = torch.zeros_like(distance_BB), torch.zeros_like(distance_BB)
        for alpha in WIDTHS:
            part_BB = torch.exp(distance_BB * (-0.5 / alpha))
            kernel_BB += part_BB
            slope_BB.add_(part_BB, alpha=-0.5 / alpha)
        slope_BB.mul_(weight_BB).fill_diagonal_(0)  # a cell does not move itself
        ctx.save_for_backward(z_BD, slope_BB)
        return kernel_BB.mul_(weight_BB).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        z_BD, slope_BB = ctx.saved_tensors
        # slopes reach 5e5 between cells that lie together, and cancel: float64
        slope_BB, z = slope_BB.double(), z_BD.double()
        gradient_BD = 4.0 * (slope_BB.sum(1, keepdim=True) * z - slope_BB @ z)
        return (scale * gradient_BD).to(z_BD), None
