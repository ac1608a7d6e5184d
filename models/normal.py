"""The normal distributions that two heads of a network give (mean, and log variance), with what models take from them.

On a CPU in float32 heads, draw and KL divergence are one node of torch's graph (`normal_kernel`) where they would be
some twenty, each of which costs more than its arithmetic. Elsewhere the same is done by torch's operations; the two
agree to 1e-5 (tests/models/test_normal.py).

Shapes: B cells (N rows), H hidden units, L latent dimensions.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scarcade.engine.contracts import Noise
from scarcade.engine.pool import run
from scarcade.models import normal_kernel as kernel
from scarcade.models.distributions import draw, kl_to_standard_normal, log_normal
from scarcade.models.products import kind_of, product_of, rows_times, times

LARGE = 1 << 16  # numbers of all cells from which on threads share them
_NONE = np.empty((0, 0), np.float32)


class Latent(NamedTuple):
    """The posterior of each cell, a draw from it, and its divergence from the prior."""

    mean_BL: Tensor
    variance_BL: Tensor
    z_BL: Tensor
    kl_B: Tensor  # KL(Normal(mean, variance) || N(0, I))


def moments(h_BH: Tensor, mean: nn.Linear, log_variance: nn.Linear, least: float) -> tuple[Tensor, Tensor]:
    """Mean and variance, (B, L) each.

    Args:
        mean: and `log_variance` are the heads.
        least: is added to the variance.
    """
    variance_BL = product_of(h_BH, log_variance.weight, log_variance.bias).exp()
    return product_of(h_BH, mean.weight, mean.bias), variance_BL + least if least else variance_BL


def latent(h_BH: Tensor, mean: nn.Linear, log_variance: nn.Linear, noise: Noise | None, least: float) -> Latent:
    """As `moments`, with a draw (the mean without noise) and its KL divergence."""
    if noise is not None and _is_compiled(mean.weight):
        noise_BL = noise.normal(len(mean.weight))
        return Latent(*_Latent.apply(h_BH, *_parts(mean, log_variance), noise_BL, least))  # type: ignore[no-untyped-call]
    mean_BL, variance_BL = moments(h_BH, mean, log_variance, least)
    return Latent(mean_BL, variance_BL, draw(mean_BL, variance_BL, noise), kl_to_standard_normal(mean_BL, variance_BL))


def log_density(x_NL: Tensor, h_NH: Tensor, mean: nn.Linear, log_variance: nn.Linear) -> Tensor:
    """log Normal(x; mean, variance) of each row (N,), where `h_NH` gives mean and variance."""
    if _is_compiled(mean.weight):
        return _Density.apply(x_NL, h_NH, *_parts(mean, log_variance))  # type: ignore[no-any-return, no-untyped-call]
    return log_normal(x_NL, *moments(h_NH, mean, log_variance, 0.0)).sum(-1)


def _parts(mean: nn.Linear, log_variance: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return mean.weight, mean.bias, log_variance.weight, log_variance.bias


def _is_compiled(weight_LH: Tensor) -> bool:
    return weight_LH.device.type == "cpu" and kind_of(weight_LH) == torch.float32


class _Latent(torch.autograd.Function):
    """See `latent`."""

    @staticmethod
    def forward(
        ctx: Any,
        h_BH: Tensor,
        weight_LH: Tensor,
        bias_L: Tensor,
        weight_of_variance_LH: Tensor,
        bias_of_variance_L: Tensor,
        noise_BL: Tensor,
        least: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        both_2LH = torch.cat((weight_LH, weight_of_variance_LH))
        product = rows_times(h_BH, both_2LH.T).numpy()
        mean_BL, variance_BL, z_BL = (torch.empty(noise_BL.shape) for _ in range(3))
        kl_B, own, noise = torch.empty(len(h_BH)), np.empty(noise_BL.shape, np.float32), noise_BL.numpy()
        biases, added = (bias_L.numpy(), bias_of_variance_L.numpy()), np.float32(least)
        outs = own, mean_BL.numpy(), variance_BL.numpy(), z_BL.numpy(), kl_B.numpy()

        def some(rows: slice) -> None:
            kernel.drawn(*(product[rows], biases, noise[rows], added), *(out[rows] for out in outs))

        _over(noise_BL.shape, some)
        ctx.save_for_backward(h_BH, both_2LH)
        ctx.kept = outs[1], outs[2], own, noise
        ctx.set_materialize_grads(False)
        return mean_BL, variance_BL, z_BL, kl_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        h_BH, both_2LH = ctx.saved_tensors
        d_mean, d_variance = (_NONE if d is None else d.contiguous().numpy() for d in given[:2])
        shape = ctx.kept[0].shape
        d_z, d_kl = (
            np.zeros(of, np.float32) if d is None else d.contiguous().numpy()
            for d, of in zip(given[2:], (shape, shape[:1]), strict=True)
        )
        d_B2L = torch.empty(shape[0], 2 * shape[1])
        d = d_B2L.numpy()

        def some(rows: slice) -> None:
            kernel.drawn_back(*(part[rows] for part in (d_mean, d_variance, d_z, d_kl, *ctx.kept, d)))

        _over(shape, some)
        return (*_through_heads(ctx, h_BH, both_2LH, d_B2L), None, None)


class _Density(torch.autograd.Function):
    """See `log_density`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NL: Tensor,
        h_NH: Tensor,
        weight_LH: Tensor,
        bias_L: Tensor,
        weight_of_variance_LH: Tensor,
        bias_of_variance_L: Tensor,
    ) -> Tensor:
        both_2LH = torch.cat((weight_LH, weight_of_variance_LH))
        product = rows_times(h_NH, both_2LH.T).numpy()
        kept, log_p_N = np.empty_like(product), torch.empty(len(h_NH))
        x, log_p = x_NL.contiguous().numpy(), log_p_N.numpy()
        biases = bias_L.numpy(), bias_of_variance_L.numpy()

        def some(rows: slice) -> None:
            kernel.density(x[rows], product[rows], biases, kept[rows], log_p[rows])

        _over(x.shape, some)
        ctx.save_for_backward(h_NH, both_2LH)
        ctx.kept = kept
        return log_p_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_N: Tensor) -> tuple[Tensor | None, ...]:
        h_NH, both_2LH = ctx.saved_tensors
        kept, given = ctx.kept, d_N.contiguous().numpy()
        d_N2L = torch.empty(kept.shape)
        d = d_N2L.numpy()

        def some(rows: slice) -> None:
            kernel.density_back(given[rows], kept[rows], d[rows])

        n_latent = kept.shape[1] // 2
        _over((len(kept), n_latent), some)
        d_x_NL = d_N2L[:, :n_latent].neg() if ctx.needs_input_grad[0] else None
        return (d_x_NL, *_through_heads(ctx, h_NH, both_2LH, d_N2L, first=1))


def _through_heads(
    ctx: Any, h_BH: Tensor, both_2LH: Tensor, d_B2L: Tensor, first: int = 0
) -> tuple[Tensor | None, ...]:
    """The gradients by hidden units, and by weights and bias of both heads, which are inputs from `first` on."""
    wants_h, *wanted = ctx.needs_input_grad[first : first + 5]
    d_h_BH = rows_times(d_B2L, both_2LH) if wants_h else None
    n_latent = len(both_2LH) // 2
    if not any(wanted):
        return d_h_BH, None, None, None, None
    d_both_2LH, d_bias_2L = times(d_B2L.T, h_BH), d_B2L.sum(0)
    weights, biases = (d_both_2LH[:n_latent], d_both_2LH[n_latent:]), (d_bias_2L[:n_latent], d_bias_2L[n_latent:])
    found = weights[0], biases[0], weights[1], biases[1]
    return (d_h_BH, *(gradient if wants else None for gradient, wants in zip(found, wanted, strict=True)))


def _over(shape: tuple[int, ...], some: Any) -> None:
    """Call it for all rows, on threads if that is worth while."""
    if shape[0] * shape[1] < LARGE:
        some(slice(None))
    else:
        run(shape[0], lambda start, stop: some(slice(start, stop)))
