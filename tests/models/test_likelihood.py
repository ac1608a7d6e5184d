from typing import Any

import pytest
import torch
from torch import Tensor

from scarcade.models.distributions import Path, elements
from scarcade.models.likelihood import FusedLikelihood, counts_log_likelihood, why_not


def made(n_cells: int, n_genes: int, *, zinb: bool, shared: bool, seed: int = 0) -> list[Tensor | None]:
    """Counts, logits, log library, log theta, dropout logits; float64, values that float32 has."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_cells, n_genes, generator=g) * 1.5
    library = torch.randn(n_cells, generator=g) * 0.5 + 6
    log_theta = torch.randn(*((n_genes,) if shared else (n_cells, n_genes)), generator=g) * 1.5
    rate = library.exp()[:, None] * torch.softmax(logits, -1)
    x = torch.poisson(rate * torch.rand(rate.shape, generator=g) ** 3, g)
    return [x, logits, library, log_theta, torch.randn(n_cells, n_genes, generator=g) * 2 if zinb else None]


def eager(x: Tensor, logits: Tensor, library: Tensor, log_theta: Tensor, dropout: Tensor | None) -> Tensor:
    rate = library.exp()[:, None] * torch.softmax(logits, -1)
    return elements("nb" if dropout is None else "zinb", x, rate, log_theta, dropout).sum(-1)


def fused(*given: Any) -> Tensor:
    return FusedLikelihood.apply(*given)  # type: ignore[no-any-return, no-untyped-call]


def value_and_gradients(function: Any, given: list[Tensor | None], dtype: torch.dtype, weight: Tensor) -> list[Tensor]:
    parts = [None if part is None else part.to(dtype).clone().requires_grad_(i > 0) for i, part in enumerate(given)]
    value = function(*parts)
    (value * weight.to(dtype)).sum().backward()
    return [value.detach(), *(p.grad for p in parts[1:] if p is not None and p.grad is not None)]


@pytest.mark.parametrize("weights", ["mean", "uneven"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("zinb", [True, False])
@pytest.mark.parametrize("n_cells", [1, 31, 32, 70])
def test_equals_the_formula(zinb: bool, shared: bool, weights: str, n_cells: int) -> None:
    given = made(n_cells, 57, zinb=zinb, shared=shared)
    weight = torch.full((n_cells,), 1 / n_cells) if weights == "mean" else torch.linspace(0.1, 2.0, n_cells)
    wanted = value_and_gradients(eager, given, torch.float64, weight)
    for found, exact in zip(value_and_gradients(fused, given, torch.float32, weight), wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("weights", ["mean", "uneven"])
@pytest.mark.parametrize("zinb", [True, False])
@pytest.mark.parametrize("n_rows", [1, 4])
def test_a_table_of_dispersions_equals_its_rows_dealt_out(n_rows: int, zinb: bool, weights: str) -> None:
    x, logits, library, _, dropout = made(70, 57, zinb=zinb, shared=True)
    g = torch.Generator().manual_seed(3)
    table, code = torch.randn(n_rows, 57, generator=g), torch.randint(0, n_rows, (70,), generator=g)
    weight = torch.full((70,), 1 / 70) if weights == "mean" else torch.linspace(0.1, 2.0, 70)

    def likelihood(path: Path) -> Any:
        return lambda *given: counts_log_likelihood(*given, code_B=code, path=path)

    given = [x, logits, library, table, dropout]
    wanted = value_and_gradients(likelihood("eager"), given, torch.float64, weight)
    for path in ("fused", "analytic"):
        found = value_and_gradients(likelihood(path), given, torch.float32, weight)
        for one, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=2e-6 * float(exact.abs().max()))


def test_a_code_without_a_row_is_refused() -> None:
    x, logits, library, log_theta, _ = made(3, 5, zinb=False, shared=True)
    assert log_theta is not None
    with pytest.raises(IndexError, match="2 rows"):
        fused(x, logits, library, log_theta.expand(2, 5), None, torch.tensor([0, 1, 2]))


def test_counts_of_all_sizes_and_fractions() -> None:
    """Counts are finished in two ways, by their size; both must meet the formula."""
    x = torch.cat([torch.arange(0.0, 40.0), torch.tensor([0.5, 1.5, 5.5, 6.5, 1023.0, 1024.0, 5000.0])])[None]
    g = torch.Generator().manual_seed(4)
    for scale in (0.1, 4.0):
        logits, log_theta = torch.randn(x.shape, generator=g) * scale, torch.randn(x.shape[1], generator=g) * scale
        for dropout in (None, torch.randn(x.shape, generator=g)):
            given = [x, logits, torch.tensor([6.0]), log_theta, dropout]
            wanted = value_and_gradients(eager, given, torch.float64, torch.ones(1))
            for found, exact in zip(
                value_and_gradients(fused, given, torch.float32, torch.ones(1)), wanted, strict=True
            ):
                torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


def test_extremes_stay_finite_and_right() -> None:
    """Dropout logits and dispersions far out, an empty cell, one gene, a count of a million."""
    x = torch.tensor([[0.0, 3.0, 1e6], [0.0, 0.0, 0.0], [0.0, 2.0, 2000.0]])
    logits = torch.tensor([[-20.0, 0.0, 20.0], [0.0, 1.0, 2.0], [80.0, -80.0, 0.0]])
    library = torch.tensor([14.0, -float("inf"), 7.0])
    log_theta = torch.tensor([-8.0, 0.0, 9.0])
    dropout = torch.tensor([[-60.0, 60.0, 0.0], [30.0, -30.0, 0.0], [-90.0, 0.0, 90.0]])
    given: list[Tensor | None] = [x, logits, library, log_theta, dropout]
    found = value_and_gradients(fused, given, torch.float32, torch.ones(3))
    assert all(torch.isfinite(part).all() for part in found)
    with torch.no_grad():
        wanted = eager(*[part.double() for part in given if part is not None])
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("zinb", [True, False])
def test_all_rates_and_dispersions(zinb: bool) -> None:
    """A cell for each combination; small counts are a product of factors only where none of them can overflow."""
    counts, libraries = torch.tensor([0.0, 1, 2, 3, 5, 6, 7, 50]), torch.linspace(-12, 12, 13)
    x, library, log_theta = torch.cartesian_prod(counts, libraries, torch.linspace(-46, 18, 33)).T
    one = torch.zeros(len(x), 1)  # gene, so the rate is the library
    given = [x[:, None], one, library.clone(), log_theta[:, None].clone(), one if zinb else None]
    wanted = value_and_gradients(eager, given, torch.float64, torch.ones(len(x)))
    found = value_and_gradients(fused, given, torch.float32, torch.ones(len(x)))
    for one_found, exact in zip(found, wanted, strict=True):
        error, size = (one_found.double() - exact).view(-1).abs(), exact.view(-1).abs()
        # the gradients are differences of numbers as large as count and rate
        assert (error <= 1e-5 * size + 1e-6 * (1 + x + library.exp())).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("where", [1, 2, 3, 4])
def test_what_is_not_finite_stays_so(where: int, shared: bool, value: float) -> None:
    """Vector code that assumes finite numbers would turn a broken model's loss into a fine one."""
    given = made(40, 57, zinb=True, shared=shared)
    part = given[where]
    assert part is not None
    part.view(-1)[20] = value
    found = value_and_gradients(fused, given, torch.float32, torch.ones(40))
    wrong = ~torch.isfinite(found[0])
    with torch.no_grad():
        wanted = ~torch.isfinite(eager(*[p.double() for p in given if p is not None]))
    assert wrong.any()
    assert torch.equal(wrong | ~wanted, torch.ones(40, dtype=torch.bool))
    assert not torch.isfinite(found[1][wrong]).any()


def test_threads_do_not_change_a_bit() -> None:
    given = made(200, 40, zinb=True, shared=True)
    before = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(value_and_gradients(fused, given, torch.float32, torch.ones(200)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_second_backward_pass_is_refused() -> None:
    given = [
        None if p is None else p.clone().requires_grad_(i > 0) for i, p in enumerate(made(4, 9, zinb=True, shared=True))
    ]
    loss = fused(*given).sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_what_it_cannot_do() -> None:
    logits = torch.zeros(2, 3)
    assert why_not("nb", logits, softplus=False) is None
    assert "poisson" in str(why_not("poisson", logits, softplus=False))
    assert "softplus" in str(why_not("nb", logits, softplus=True))
    assert "float64" in str(why_not("nb", logits.double(), softplus=False))
    assert "meta" in str(why_not("nb", logits.to("meta"), softplus=False))
