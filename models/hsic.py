"""Hilbert-Schmidt independence criterion: how much two parts of a latent depend on each other, over a batch.

expiMap keeps new, unconstrained terms apart from the known ones with it (Lotfollahi et al. 2023). Kernels are
Gaussian, with a width that grows with the number of dimensions. Shapes: B cells, D and E dimensions.
"""

import math

import torch
from torch import Tensor


def hsic(x_BD: Tensor, y_BE: Tensor) -> Tensor:
    """sqrt of the biased estimate, a scalar; 0 for parts that do not depend on each other.

    The original takes the gamma function itself, which overflows for more than 341 dimensions, and the root of
    what rounding can make negative.
    """
    x_BB, y_BB = kernel(x_BD.double()), kernel(y_BE.double())  # what follows cancels
    value = (x_BB * y_BB).mean() + x_BB.mean() * y_BB.mean() - 2 * (x_BB.mean(1) * y_BB.mean(1)).mean()
    return value.clamp(min=1e-12).sqrt().to(x_BD.dtype)


def kernel(x_BD: Tensor) -> Tensor:
    """exp(-factor * squared distance) of all pairs of cells, (B, B)."""
    x_BD = x_BD - x_BD.mean(0)  # distances stay, and less cancels
    square_B = x_BD.square().sum(1)
    distance_BB = (square_B[:, None] + square_B - 2 * x_BD @ x_BD.T).clamp(min=0)
    return torch.exp(-width_factor(x_BD.shape[1]) * distance_BB)


def width_factor(n_dimensions: int) -> float:
    """1 / (2 g^2), g the mean length of a standard normal vector times sqrt(2)."""
    d = n_dimensions
    g = 2 * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    return 1 / (2 * g**2)
