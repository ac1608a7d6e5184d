"""Proximal operators: what a step of proximal gradient descent does to weights after the step of the optimiser.

They shrink weights to exact zeros, which a penalty in the loss does not. As in expiMap (Lotfollahi et al. 2023,
Methods) thresholds are multiplied by the learning rate alone, although Adam's steps are scaled further.
"""

import torch
from torch import Tensor


@torch.no_grad()
def shrink_groups_(weight_GT: Tensor, threshold_T: Tensor) -> None:
    """Group lasso in place: column t becomes (1 - threshold / norm) of itself, or 0 if its norm is not larger."""
    norm_T = weight_GT.square().sum(0).sqrt()  # torch's norm of columns is slower
    weight_GT.mul_(torch.where(norm_T > threshold_T, 1 - threshold_T / norm_T, 0.0))


@torch.no_grad()
def shrink_(weight: Tensor, threshold: float, where: Tensor | None = None) -> None:
    """Lasso in place: each weight moves by `threshold` towards 0 and stops there; only those in `where` (bool)."""
    small = torch.sign(weight) * (weight.abs() - threshold).clamp(min=0)
    weight.copy_(small if where is None else torch.where(where, small, weight))


def annealed(epoch: int, epochs: int | None, every: int) -> float:
    """From 1 / `epochs` to 1 in `epochs`, in stairs of `every` epochs; 1 without `epochs` (scArches' trainer)."""
    if epochs is None:
        return 1.0
    return min(max(epoch // every * every, 1) / epochs, 1.0)
