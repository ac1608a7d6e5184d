"""The likelihood's kernels for GPUs against the formula; without a GPU by Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from scarcade.models.distributions import Family, elements
from scarcade.models.gpu_likelihood import log_p_of
from tests.gpu import DEVICE, needs_triton

pytestmark = needs_triton
N_CELLS, N_CODES = 10, 3


def made(n_genes: int, theta: str, seed: int = 0) -> dict[str, Any]:
    """Counts with an empty cell and two large ones; dispersions over many orders of magnitude."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    x_BG = torch.poisson(torch.exp(2 * normal(N_CELLS, n_genes) - 2), generator=rng)
    x_BG[0] = 0
    if n_genes > 1:
        x_BG[1, 0], x_BG[2, n_genes - 1] = 2_000, 300
    shape = {"gene": (n_genes,), "cell": (N_CELLS, n_genes), "table": (N_CODES, n_genes)}[theta]
    return {
        "x": x_BG,
        "logits": 2 * normal(N_CELLS, n_genes),
        "log_library": (x_BG.sum(-1) + 1).log(),
        "log_theta": 3 * normal(*shape),
        "dropout": 3 * normal(N_CELLS, n_genes),
        "code": torch.arange(N_CELLS) % N_CODES if theta == "table" else None,
        "weight": torch.rand(N_CELLS, generator=rng),
    }


def formula(given: dict[str, Any], family: Family, kind: torch.dtype) -> tuple[Tensor, ...]:
    """log p of each cell and its weighted gradients by logits, log library, log theta (and dropout)."""
    names = ["logits", "log_library", "log_theta", *(["dropout"] if family == "zinb" else [])]
    leaves = {name: given[name].to(kind).requires_grad_() for name in names}
    theta = leaves["log_theta"] if given["code"] is None else leaves["log_theta"][given["code"]]
    rate_BG = leaves["log_library"].exp()[:, None] * leaves["logits"].softmax(-1)
    value_B = elements(family, given["x"].to(kind), rate_BG, theta, leaves.get("dropout")).sum(-1)
    gradients = torch.autograd.grad((value_B * given["weight"].to(kind)).sum(), list(leaves.values()))
    return value_B.detach(), *gradients


def kernel(given: dict[str, Any], family: Family) -> tuple[Tensor, ...]:
    names = ["logits", "log_library", "log_theta", *(["dropout"] if family == "zinb" else [])]
    leaves = {name: given[name].to(DEVICE).requires_grad_() for name in names}
    code = None if given["code"] is None else given["code"].to(DEVICE)
    first = given["x"].to(DEVICE), leaves["logits"], leaves["log_library"], leaves["log_theta"]
    value_B = log_p_of(*first, leaves.get("dropout"), code)
    gradients = torch.autograd.grad((value_B * given["weight"].to(DEVICE)).sum(), list(leaves.values()))
    return tuple(part.detach().cpu() for part in (value_B, *gradients))


def error(found: Tensor, exact: Tensor) -> float:
    assert bool(torch.isfinite(found).all())
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.long
@pytest.mark.parametrize("theta", ["gene", "cell", "table"])
@pytest.mark.parametrize("family", ["nb", "zinb"])
@pytest.mark.parametrize("n_genes", [1, 512, 700])
def test_value_and_gradients_are_those_of_the_formula(family: Family, theta: str, n_genes: int) -> None:
    given = made(n_genes, theta)
    for found, exact in zip(kernel(given, family), formula(given, family, torch.float64), strict=True):
        if float(exact.norm()) == 0:  # the softmax of one gene has no gradient
            assert float(found.norm()) < 1e-4
        else:
            assert error(found, exact) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("largest", [100, 2_000, 60_000])
@pytest.mark.parametrize("family", ["nb", "zinb"])
@pytest.mark.parametrize("theta", [-3.0, 0.0, 4.0])
def test_large_counts_do_not_cancel(family: Family, theta: float, largest: int) -> None:
    """The error of each entry, as a share of the largest."""
    given = made(700, "gene", seed=1)
    rng = torch.Generator().manual_seed(3)
    given["x"][:, ::7] = torch.randint(0, largest, (N_CELLS, 100), generator=rng).float()
    given["log_library"] = given["x"].sum(-1).clamp(min=1).log()
    given["log_theta"] = torch.full((700,), theta)
    for found, right in zip(kernel(given, family), formula(given, family, torch.float64), strict=True):
        assert bool(torch.isfinite(found).all())
        assert float((found.double() - right).abs().max() / right.abs().max()) < 3e-5


def test_a_dispersion_near_nothing_or_beyond_all_counts_has_a_likelihood() -> None:
    given = made(64, "gene")
    given["log_theta"] = torch.linspace(-40, 16, 64)  # beyond that the formula is noise in float64, too
    exact = formula(given, "nb", torch.float64)
    for found, right in zip(kernel(given, "nb"), exact, strict=True):
        assert error(found, right) < 1e-5


def test_an_empty_cell_without_a_library_has_a_likelihood_and_no_gradient() -> None:
    given = made(100, "gene")
    given["log_library"][0] = -torch.inf
    value_B, d_logits_BG, d_library_B, *_ = kernel(given, "nb")
    assert value_B[0] == 0
    assert d_library_B[0] == 0
    assert bool((d_logits_BG[0] == 0).all())


def test_what_it_gives_does_not_depend_on_the_other_cells() -> None:
    given = made(300, "gene")
    fewer = {name: value[3:8] if name not in ("log_theta", "code") else value for name, value in given.items()}
    for whole, part in zip(kernel(given, "zinb")[:2], kernel(fewer, "zinb")[:2], strict=True):
        assert torch.equal(whole[3:8], part)


def test_without_cells_there_is_nothing() -> None:
    nothing = torch.zeros(0, 5, device=DEVICE)
    logits = nothing.clone().requires_grad_()
    log_theta = torch.zeros(5, device=DEVICE, requires_grad=True)
    value_B = log_p_of(nothing, logits, nothing[:, 0], log_theta, None)
    value_B.sum().backward()  # type: ignore[no-untyped-call]
    assert value_B.shape == (0,)
    assert log_theta.grad is not None
    assert bool((log_theta.grad == 0).all())
