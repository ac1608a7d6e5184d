"""The compiled normal distributions give the numbers of torch's operations, forward and back."""

from typing import Any

import pytest
import torch
from torch import Tensor

from scarcade.engine.contracts import Noise
from scarcade.models import normal
from scarcade.models.layers import Linear, seeded

CELLS, UNITS = 70, 12
PARTS = ("mean", "variance", "z", "kl")


class Given(Noise):
    """Noise that is known."""

    def __init__(self, noise_BL: Tensor) -> None:
        self._noise_BL = noise_BL

    def normal(self, *features: int) -> Tensor:
        assert features == self._noise_BL.shape[1:]
        return self._noise_BL


def heads(n_latent: int) -> tuple[Linear, Linear]:
    generator = seeded("heads")
    return Linear(UNITS, n_latent, generator), Linear(UNITS, n_latent, generator)


def numbers(*shape: int, of: str, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=seeded(of))


def found(given: list[Tensor], outs: list[Tensor]) -> list[Tensor]:
    """Values, and gradients of a sum with weights that differ."""
    total = sum((out * numbers(*out.shape, of=f"weights {i}")).sum() for i, out in enumerate(outs))
    assert isinstance(total, Tensor)
    return [*outs, *torch.autograd.grad(total, given)]


def both(of: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """By the kernel, and by torch's operations."""
    compiled = of()
    monkeypatch.setattr(normal, "_is_compiled", lambda weight_LH: False)
    return compiled, of()


def near(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [PARTS, ("z", "kl"), ("z",), ("kl",), ("mean", "variance")])
@pytest.mark.parametrize("least", [0.0, 1e-4])
@pytest.mark.parametrize("n_latent", [1, 4, 10, 33])
def test_latent(n_latent: int, least: float, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    mean, variance = heads(n_latent)
    h_BH = numbers(CELLS, UNITS, of="h", scale=2.0).requires_grad_()
    noise = Given(numbers(CELLS, n_latent, of="noise"))
    given = [h_BH, *mean.parameters(), *variance.parameters()]

    def latent() -> list[Tensor]:
        parts = dict(zip(PARTS, normal.latent(h_BH, mean, variance, noise, least), strict=True))
        return found(given, [parts[name] for name in wanted])

    near(*both(latent, monkeypatch))


def test_many_cells_are_shared_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, variance = heads(10)
    n = normal.LARGE // 10 + 100
    h_BH = numbers(n, UNITS, of="h").requires_grad_()
    noise, x_BL = Given(numbers(n, 10, of="noise")), numbers(n, 10, of="x").requires_grad_()
    given = [h_BH, x_BL]

    def whole() -> list[Tensor]:
        parts = normal.latent(h_BH, mean, variance, noise, 1e-4)
        return found(given, [parts.z_BL, parts.kl_B, normal.log_density(x_BL, h_BH, mean, variance)])

    near(*both(whole, monkeypatch))


@pytest.mark.parametrize("n_latent", [1, 10, 33])
def test_log_density(n_latent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mean, variance = heads(n_latent)
    h_NH, x_NL = numbers(CELLS, UNITS, of="h", scale=2.0), numbers(CELLS, n_latent, of="x")
    given = [h_NH.requires_grad_(), x_NL.requires_grad_(), *mean.parameters(), *variance.parameters()]
    near(*both(lambda: found(given, [normal.log_density(x_NL, h_NH, mean, variance)]), monkeypatch))


def test_frozen_heads_have_no_gradient_and_the_rest_has(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, variance = heads(4)
    for parameter in (*mean.parameters(), variance.weight):
        parameter.requires_grad_(False)
    h_BH, noise = numbers(CELLS, UNITS, of="h").requires_grad_(), Given(numbers(CELLS, 4, of="noise"))
    given = [h_BH, variance.bias]
    near(*both(lambda: found(given, list(normal.latent(h_BH, mean, variance, noise, 1e-4)[2:])), monkeypatch))
    assert mean.weight.grad is None


def test_without_noise_the_draw_is_the_mean() -> None:
    mean, variance = heads(4)
    found = normal.latent(numbers(CELLS, UNITS, of="h"), mean, variance, None, 1e-4)
    assert torch.equal(found.z_BL, found.mean_BL)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("head", [0, 1])
def test_what_is_not_finite_comes_through(head: int, value: float) -> None:
    both = heads(10)
    with torch.no_grad():
        both[head].bias[8] = value  # of those that do not fill a vector
    h_BH, noise = numbers(CELLS, UNITS, of="h").requires_grad_(), Given(numbers(CELLS, 10, of="noise"))
    parts = normal.latent(h_BH, *both, noise, 0.0)
    assert not parts.kl_B.isfinite().any()
    assert not normal.log_density(numbers(CELLS, 10, of="x"), h_BH, *both).isfinite().any()


@pytest.mark.parametrize("log_variance", [-200.0, -95.0])
def test_the_divergence_of_a_tiny_variance_is_not_capped(log_variance: float) -> None:
    mean, variance = heads(10)
    with torch.no_grad():
        variance.weight.zero_()
        variance.bias.fill_(log_variance)
    noise = Given(numbers(CELLS, 10, of="noise"))
    found = normal.latent(numbers(CELLS, UNITS, of="h"), mean, variance, noise, 0.0)
    wanted_B = 0.5 * (found.mean_BL**2 - 1 - log_variance).sum(-1)
    torch.testing.assert_close(found.kl_B, wanted_B)


def test_a_variance_that_is_too_large_is_infinite() -> None:
    mean, variance = heads(10)
    with torch.no_grad():
        variance.bias.fill_(200.0)
    noise = Given(numbers(CELLS, 10, of="noise"))
    assert not normal.latent(numbers(CELLS, UNITS, of="h"), mean, variance, noise, 0.0).kl_B.isfinite().any()


@pytest.mark.parametrize("log_variance", [-200.0, -80.0, 40.0])
def test_odd_variances_have_finite_gradients(log_variance: float) -> None:
    mean, variance = heads(4)
    with torch.no_grad():
        variance.weight.zero_()
        variance.bias.fill_(log_variance)
    h_BH, noise = numbers(CELLS, UNITS, of="h").requires_grad_(), Given(numbers(CELLS, 4, of="noise"))
    parts = normal.latent(h_BH, mean, variance, noise, 1e-4)
    (d_h_BH, d_bias_L) = torch.autograd.grad(parts.kl_B.sum() + parts.z_BL.sum(), [h_BH, variance.bias])
    assert bool(d_h_BH.isfinite().all())
    assert bool(d_bias_L.isfinite().all())
