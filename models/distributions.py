"""Log-likelihoods of counts, summed over the genes of each cell, with exact gradients; and draws from them.

Every family is here in two forms. The *eager* one is the formula, differentiated by torch: it is what the
tests hold everything else against. The *analytic* one is an autograd function that computes value and
gradients in one go (on any device). `models.likelihood_kernel` has a third, compiled for CPUs, which also
folds in the softmax; docs/decisions/002-likelihood.md gives what each of them costs.

Formulas: Lopez et al. 2018 (scVI), in the parametrisation of scvi-tools 1.4.2. ``eps`` is 1e-8 throughout.
Shapes: B cells, G genes. ``log_theta`` (log inverse dispersion) is (G,) or (B, G).
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from scarcade.engine.contracts import Noise

EPS = 1e-8
LOG_SQRT_2PI = 0.9189385332046727

Family = Literal["zinb", "nb", "poisson", "normal"]
Path = Literal["auto", "eager", "analytic", "fused"]


def log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log Normal(x; mean, variance) of each entry."""
    return -0.5 * ((x - mean) ** 2 / variance + variance.log()) - LOG_SQRT_2PI


def nb_elements(x_BG: Tensor, rate_BG: Tensor, log_theta: Tensor) -> Tensor:
    """log NB(x; mean rate, inverse dispersion theta), (B, G)."""
    theta = log_theta.exp()
    log_sum = torch.log(theta + rate_BG + EPS)
    return (
        theta * (torch.log(theta + EPS) - log_sum)
        + x_BG * (torch.log(rate_BG + EPS) - log_sum)
        + torch.lgamma(x_BG + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x_BG + 1)
    )


def zinb_elements(x_BG: Tensor, rate_BG: Tensor, log_theta: Tensor, dropout_BG: Tensor) -> Tensor:
    """log ZINB; sigmoid(dropout) is the probability of an extra zero, (B, G)."""
    theta = log_theta.exp()
    a_BG = theta * (torch.log(theta + EPS) - torch.log(theta + rate_BG + EPS)) - dropout_BG
    s_BG = F.softplus(-dropout_BG)
    zero_BG = F.softplus(a_BG) - s_BG
    more_BG = nb_elements(x_BG, rate_BG, log_theta) - dropout_BG - s_BG
    return torch.where(x_BG < EPS, zero_BG, more_BG)


def nb_mixture_elements(x_BP: Tensor, low_BP: Tensor, high_BP: Tensor, log_theta: Tensor, mixing_BP: Tensor) -> Tensor:
    """log of a mixture of two negative binomials with means low and high and one theta, (B, P).

    sigmoid(mixing) is the weight of the low component (totalVI: of the background).
    """
    theta = log_theta.exp()
    log_theta_eps = torch.log(theta + EPS)

    def ratio(rate_BP: Tensor) -> Tensor:
        log_sum_BP = torch.log(theta + rate_BP + EPS)
        return theta * (log_theta_eps - log_sum_BP) + x_BP * (torch.log(rate_BP + EPS) - log_sum_BP)

    shared_BP = torch.lgamma(x_BP + theta) - torch.lgamma(theta) - torch.lgamma(x_BP + 1)
    either_BP = torch.logaddexp(ratio(low_BP), ratio(high_BP) - mixing_BP)
    return either_BP - F.softplus(-mixing_BP) + shared_BP


def poisson_elements(x_BG: Tensor, rate_BG: Tensor) -> Tensor:
    """log Poisson(x; rate), (B, G)."""
    return torch.xlogy(x_BG, rate_BG) - rate_BG - torch.lgamma(x_BG + 1)


def normal_elements(x_BG: Tensor, rate_BG: Tensor, log_sd: Tensor) -> Tensor:
    """log Normal(x; mean rate, standard deviation exp(log_sd)), (B, G)."""
    return -0.5 * ((x_BG - rate_BG) * torch.exp(-log_sd)) ** 2 - log_sd - LOG_SQRT_2PI


def elements(
    family: Family, x_BG: Tensor, rate_BG: Tensor, log_theta: Tensor | None, dropout_BG: Tensor | None
) -> Tensor:
    """The eager form of any family: log p(x) of every entry, (B, G)."""
    if family == "poisson":
        return poisson_elements(x_BG, rate_BG)
    assert log_theta is not None
    if family == "normal":
        return normal_elements(x_BG, rate_BG, log_theta)
    if family == "nb":
        return nb_elements(x_BG, rate_BG, log_theta)
    assert dropout_BG is not None
    return zinb_elements(x_BG, rate_BG, log_theta, dropout_BG)


def _summed(weight_B: Tensor, gradient_BG: Tensor, like: Tensor) -> Tensor:
    """The gradient of a (B, G) or broadcast (G,) argument, given each cell's weight."""
    return weight_B @ gradient_BG if like.dim() == 1 else weight_B[:, None] * gradient_BG


class _Analytic(torch.autograd.Function):
    """Saves the element-wise gradients made in the forward pass; the backward pass only weighs them."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_B: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, log_theta = ctx.saved_tensors
        out: list[Tensor | None] = [None]
        for i, gradient_BG in enumerate(gradients):
            if not ctx.needs_input_grad[i + 1]:
                out.append(None)
            elif i == 1:
                out.append(_summed(weight_B, gradient_BG, log_theta))
            else:
                out.append(weight_B[:, None] * gradient_BG)
        return tuple(out)


def _nb(x_BG: Tensor, rate_BG: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log p, its gradients by rate and log theta, the part of it that stays at x = 0, that part's d/d log theta)."""
    sum_BG = theta + rate_BG + EPS
    log_ratio_BG = torch.log(theta + EPS) - torch.log(sum_BG)
    zero_BG = theta * log_ratio_BG
    d_zero_BG = theta * (log_ratio_BG + theta / (theta + EPS) - theta / sum_BG)
    log_p_BG = (
        zero_BG
        + x_BG * (torch.log(rate_BG + EPS) - torch.log(sum_BG))
        + torch.lgamma(x_BG + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x_BG + 1)
    )
    d_rate_BG = x_BG / (rate_BG + EPS) - (x_BG + theta) / sum_BG
    d_theta_BG = d_zero_BG + theta * (torch.digamma(x_BG + theta) - torch.digamma(theta) - x_BG / sum_BG)
    return log_p_BG, d_rate_BG, d_theta_BG, zero_BG, d_zero_BG


class NegativeBinomial(_Analytic):
    """(x, rate, log_theta) -> log p of each cell (B,)."""

    @staticmethod
    def forward(ctx: Any, x_BG: Tensor, rate_BG: Tensor, log_theta: Tensor) -> Tensor:
        log_p_BG, d_rate_BG, d_theta_BG, _, _ = _nb(x_BG, rate_BG, log_theta.exp())
        ctx.save_for_backward(d_rate_BG, d_theta_BG, log_theta)
        return log_p_BG.sum(-1)


class ZeroInflatedNegativeBinomial(_Analytic):
    """(x, rate, log_theta, dropout logits) -> log p of each cell (B,)."""

    @staticmethod
    def forward(ctx: Any, x_BG: Tensor, rate_BG: Tensor, log_theta: Tensor, dropout_BG: Tensor) -> Tensor:
        theta = log_theta.exp()
        log_p_BG, d_rate_BG, d_theta_BG, nb_zero_BG, d_zero_BG = _nb(x_BG, rate_BG, theta)
        zero = x_BG < EPS
        stay_BG = torch.sigmoid(dropout_BG)
        a_BG = nb_zero_BG - dropout_BG
        from_nb_BG = torch.sigmoid(a_BG)  # probability that a zero is one of the negative binomial
        s_BG = F.softplus(-dropout_BG)
        value_BG = torch.where(zero, F.softplus(a_BG) - s_BG, log_p_BG - dropout_BG - s_BG)
        d_rate_BG = torch.where(zero, -from_nb_BG * theta / (theta + rate_BG + EPS), d_rate_BG)
        d_theta_BG = torch.where(zero, from_nb_BG * d_zero_BG, d_theta_BG)
        # d softplus(-pi) / d pi = -(1 - sigmoid(pi))
        d_dropout_BG = torch.where(zero, 1 - stay_BG - from_nb_BG, -stay_BG)
        ctx.save_for_backward(d_rate_BG, d_theta_BG, d_dropout_BG, log_theta)
        return value_BG.sum(-1)


class Poisson(torch.autograd.Function):
    """(x, rate) -> log p of each cell (B,)."""

    @staticmethod
    def forward(ctx: Any, x_BG: Tensor, rate_BG: Tensor) -> Tensor:
        ctx.save_for_backward(torch.where(x_BG > 0, x_BG / rate_BG, 0.0) - 1)
        return poisson_elements(x_BG, rate_BG).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_B: Tensor) -> tuple[None, Tensor]:
        (d_rate_BG,) = ctx.saved_tensors
        return None, weight_B[:, None] * d_rate_BG


class Normal(_Analytic):
    """(x, rate, log standard deviation) -> log p of each cell (B,)."""

    @staticmethod
    def forward(ctx: Any, x_BG: Tensor, rate_BG: Tensor, log_sd: Tensor) -> Tensor:
        precision = torch.exp(-log_sd)
        scaled_BG = (x_BG - rate_BG) * precision
        ctx.save_for_backward(scaled_BG * precision, scaled_BG**2 - 1, log_sd)
        return (-0.5 * scaled_BG**2 - log_sd - LOG_SQRT_2PI).sum(-1)


def analytic(
    family: Family, x_BG: Tensor, rate_BG: Tensor, log_theta: Tensor | None, dropout_BG: Tensor | None
) -> Tensor:
    """The analytic form of any family: log p(x) of each cell, (B,)."""
    if family == "poisson":
        return Poisson.apply(x_BG, rate_BG)  # type: ignore[no-any-return, no-untyped-call]
    if family == "normal":
        return Normal.apply(x_BG, rate_BG, log_theta)  # type: ignore[no-any-return, no-untyped-call]
    if family == "nb":
        return NegativeBinomial.apply(x_BG, rate_BG, log_theta)  # type: ignore[no-any-return, no-untyped-call]
    return ZeroInflatedNegativeBinomial.apply(x_BG, rate_BG, log_theta, dropout_BG)  # type: ignore[no-any-return, no-untyped-call]


def log_likelihood(
    family: Family,
    x_BG: Tensor,
    rate_BG: Tensor,
    log_theta: Tensor | None = None,
    dropout_BG: Tensor | None = None,
    *,
    path: Path = "auto",
) -> Tensor:
    """log p(x) of each cell, summed over its genes, (B,).

    Args:
        family: `log_theta` is the log standard deviation for "normal" and is not used by "poisson".
        x_BG: counts.
        rate_BG: means.
        path: "eager" is the plain formula; anything else the analytic form.
    """
    if path == "eager":
        return elements(family, x_BG, rate_BG, log_theta, dropout_BG).sum(-1)
    return analytic(family, x_BG, rate_BG, log_theta, dropout_BG)


def sample(
    family: Family, rate_BG: Tensor, log_theta: Tensor | None, dropout_BG: Tensor | None, generator: torch.Generator
) -> Tensor:
    """One draw of x, (B, G); the negative binomial as a gamma-Poisson mixture with its rate capped at 1e8."""
    if family == "poisson":
        return torch.poisson(rate_BG, generator)
    assert log_theta is not None
    if family == "normal":
        noise_BG = torch.randn(rate_BG.shape, generator=generator, device=rate_BG.device)
        return rate_BG + noise_BG * log_theta.exp()
    theta_BG = log_theta.exp().expand_as(rate_BG).contiguous()
    gamma_BG = torch._standard_gamma(theta_BG, generator=generator) * (rate_BG / theta_BG)
    x_BG = torch.poisson(gamma_BG.clamp_(max=1e8), generator)
    if family == "zinb":
        assert dropout_BG is not None
        extra_zero = torch.rand(rate_BG.shape, generator=generator, device=rate_BG.device) <= torch.sigmoid(dropout_BG)
        x_BG = torch.where(extra_zero, 0.0, x_BG)
    return x_BG


def kl_to_standard_normal(mean_BL: Tensor, variance_BL: Tensor) -> Tensor:
    """KL(Normal(mean, variance) || Normal(0, 1)), summed over the latent dimensions, (B,)."""
    return 0.5 * (variance_BL + mean_BL**2 - 1 - variance_BL.log()).sum(-1)


def kl_normal(mean: Tensor, variance: Tensor, prior_mean: Tensor, prior_variance: Tensor) -> Tensor:
    """KL between two normal distributions, element by element."""
    ratio = variance / prior_variance
    return 0.5 * (ratio + (mean - prior_mean) ** 2 / prior_variance - 1 - ratio.log())


def draw(mean_BL: Tensor, variance_BL: Tensor, noise: Noise | None) -> Tensor:
    """A reparametrised draw, or the mean without noise."""
    return mean_BL if noise is None else mean_BL + variance_BL.sqrt() * noise.normal(*mean_BL.shape[1:])
