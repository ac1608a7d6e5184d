from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from scarcade.models import distributions as d

FAMILIES = ["zinb", "nb", "poisson", "normal"]


def made(n_cells: int = 7, n_genes: int = 11, *, shared: bool = True, seed: int = 0) -> list[Tensor]:
    """Counts, rates, log theta and dropout logits, float64; a third of the counts are zero."""
    g = torch.Generator().manual_seed(seed)
    rate = torch.rand(n_cells, n_genes, generator=g, dtype=torch.float64) * 4 + 0.05
    x = torch.poisson(rate, g)
    theta = torch.randn(*((n_genes,) if shared else (n_cells, n_genes)), generator=g, dtype=torch.float64)
    return [x, rate, theta, torch.randn(n_cells, n_genes, generator=g, dtype=torch.float64)]


def arguments(family: str, made_up: list[Tensor]) -> tuple[Any, ...]:
    x, rate, theta, dropout = made_up
    return x, rate, None if family == "poisson" else theta, dropout if family == "zinb" else None


def value_and_gradients(family: Any, given: tuple[Any, ...], path: Any, dtype: torch.dtype) -> list[Tensor]:
    x, *rest = (None if part is None else part.to(dtype).clone() for part in given)
    assert x is not None
    for part in rest:
        if part is not None:
            part.requires_grad_(True)
    value = d.log_likelihood(family, x, *rest, path=path)  # type: ignore[arg-type]
    weights = torch.linspace(0.5, 2.0, len(value), dtype=dtype)
    (value * weights).sum().backward()  # type: ignore[no-untyped-call]
    return [value.detach(), *(part.grad for part in rest if part is not None)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_analytic_gradients_pass_gradcheck(family: Any, shared: bool) -> None:
    x, *rest = arguments(family, made(3, 5, shared=shared))
    inputs = [part.requires_grad_(True) for part in rest if part is not None]

    def of(*parts: Tensor) -> Tensor:
        return d.log_likelihood(family, x, *parts, path="analytic")

    assert torch.autograd.gradcheck(of, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_analytic_equals_eager(family: Any, shared: bool, dtype: torch.dtype) -> None:
    given = arguments(family, made(shared=shared))
    eager = value_and_gradients(family, given, "eager", dtype)
    for found, wanted in zip(value_and_gradients(family, given, "analytic", dtype), eager, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_values_against_scipy() -> None:
    x, rate, log_theta, dropout = made()
    theta = log_theta.exp()
    n, p = theta.numpy(), (theta / (theta + rate)).numpy()
    nb = scipy.stats.nbinom.logpmf(x.numpy(), n, p)
    np.testing.assert_allclose(d.elements("nb", x, rate, log_theta, None), nb, rtol=1e-5, atol=1e-6)
    extra = torch.sigmoid(dropout).numpy()
    zinb = np.log(np.where(x == 0, extra, 0.0) + (1 - extra) * np.exp(nb))
    np.testing.assert_allclose(d.elements("zinb", x, rate, log_theta, dropout), zinb, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        d.elements("poisson", x, rate, None, None), scipy.stats.poisson.logpmf(x, rate), rtol=1e-9
    )
    normal = scipy.stats.norm.logpdf(x, rate, n)
    np.testing.assert_allclose(d.elements("normal", x, rate, log_theta, None), normal, rtol=1e-9)


def test_zinb_is_a_distribution() -> None:
    x = torch.arange(4000, dtype=torch.float64)[:, None]
    p = d.elements("zinb", x, torch.full_like(x, 3.0), torch.zeros(1, dtype=torch.float64), torch.full_like(x, -0.7))
    assert abs(float(p.exp().sum()) - 1) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_have_the_mean(family: Any) -> None:
    rate, theta = torch.full((20000, 2), 3.0), torch.tensor([0.5, 1.0])
    dropout = torch.full_like(rate, -1.0)
    x = d.sample(family, rate, theta, dropout, torch.Generator().manual_seed(0))
    mean = 3.0 * (1 - 1 / (1 + np.e)) if family == "zinb" else 3.0
    np.testing.assert_allclose(x.mean(0), mean, rtol=0.05)
    again = d.sample(family, rate, theta, dropout, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)


def test_kl_against_torch() -> None:
    g = torch.Generator().manual_seed(0)
    mean, variance, m0, v0 = torch.randn(5, 3, generator=g), *(torch.rand(3, 5, 3, generator=g) + 0.1)
    q = torch.distributions.Normal(mean, variance.sqrt())
    standard = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(
        d.kl_to_standard_normal(mean, variance), torch.distributions.kl_divergence(q, standard).sum(-1)
    )
    prior = torch.distributions.Normal(m0, v0.sqrt())
    torch.testing.assert_close(d.kl_normal(mean, variance, m0, v0), torch.distributions.kl_divergence(q, prior))
