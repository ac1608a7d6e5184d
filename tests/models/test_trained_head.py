from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from scarcade.engine import blas, crew
from scarcade.engine.later import gradients_later
from scarcade.engine.pool import alone
from scarcade.engine.pool import threads as torch_threads
from scarcade.engine.precision import products_in
from scarcade.engine.weighing import a_cell_weighs
from scarcade.models import head_crew
from scarcade.models.layers import ConditionalLinear, Linear, seeded
from scarcade.models.likelihood import FusedLikelihood
from scarcade.models.trained_head import Logits, head_log_likelihood, logits_of

GENES, HIDDEN = 203, 16


class Made:
    """Cells, a last layer (two of zinb), library and theta, all with gradients."""

    def __init__(self, cells: int, *, zinb: bool, thetas: int, biases: int) -> None:
        g = torch.Generator().manual_seed(cells)

        def normal(*shape: int, by: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g) * by).requires_grad_()

        rate = torch.rand(cells, GENES, generator=g) * 2 * (torch.rand(cells, GENES, generator=g) < 0.5)
        self.x = torch.poisson(rate, generator=g)
        self.h, self.weight, self.more_weight = normal(cells, HIDDEN), *(normal(GENES, HIDDEN, by=0.3) for _ in "ab")
        self.table, self.more_table = normal(biases, GENES), normal(biases, GENES)
        self.theta = normal(GENES) if thetas == 1 else normal(thetas, GENES)
        self.library = self.x.sum(1).log().requires_grad_()
        code = torch.randint(0, biases, (cells,), generator=g) if biases > 1 else None
        self.theta_code = torch.randint(0, thetas, (cells,), generator=g) if thetas > 1 else None
        self.logits = Logits(self.h, self.weight, self.table, code)
        self.dropout = Logits(self.h, self.more_weight, self.more_table, code) if zinb else None
        self.inputs = [self.h, self.weight, self.table, self.theta, self.library]
        self.inputs += [self.more_weight, self.more_table] if zinb else []

    def plain(self) -> Tensor:
        dropout = None if self.dropout is None else self.dropout.tensor()
        found: Tensor = FusedLikelihood.apply(  # type: ignore[no-untyped-call]
            self.x, self.logits.tensor(), self.library, self.theta, dropout, self.theta_code
        )
        return found

    def head(self) -> Tensor:
        return head_log_likelihood(self.x, self.logits, self.library, self.theta, self.dropout, self.theta_code)


@pytest.mark.parametrize("weights", ["mean", "uneven"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("zinb", [True, False])
@pytest.mark.parametrize("cells", [1, 32, 130, 700])
def test_it_is_the_layers_and_their_likelihood(cells: int, zinb: bool, shared: bool, weights: str) -> None:
    made = Made(cells, zinb=zinb, thetas=1 if shared else 3, biases=1 if shared else 4)
    weight = torch.full((cells,), 1 / cells) if weights == "mean" else torch.linspace(0.1, 2.0, cells)
    wanted, found = made.plain(), made.head()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    both = [torch.autograd.grad((value * weight).sum(), made.inputs) for value in (wanted, found)]
    for exact, one in zip(*both, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-4, atol=2e-6 * float(exact.abs().max()))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads there are, for the time of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not crew.can_be_had(), reason="there is none here")
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("cells", [40, 150, 700])
@pytest.mark.parametrize("shared", [True, False])
def test_it_is_the_same_by_tiles_by_mkl_and_without_a_crew(
    cells: int, shared: bool, n_threads: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(cells, zinb=True, thetas=1 if shared else 3, biases=1 if shared else 4)
    threads(n_threads)
    found = []
    for way in ((0, 0), blas.functions(), None):
        monkeypatch.setattr(head_crew, "functions", lambda way=way: way)
        assert head_crew.can(torch.float32) == (way is not None)
        value = made.head()
        found.append([value.detach(), *torch.autograd.grad(value.mean(), made.inputs)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def _gradients(made: Made, losses: Callable[[], Tensor], *, later: bool) -> list[Tensor | None]:
    """Of all leaves, by a backward pass."""
    leaves = [*made.inputs]
    for leaf in leaves:
        leaf.grad = None
    with gradients_later(allowed=later) as due:
        losses().backward()  # type: ignore[no-untyped-call]
        left = sum(one.wanted for one in due.dues)
        due.settle()
    assert (left > 0) == (later and torch_threads() > 1 and head_crew.can(torch.float32))
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("cells", [40, 150, 700])
@pytest.mark.parametrize("kind", ["mean", "uneven", "twice", "two batches", "not all", "beside", "more"])
def test_gradients_that_come_later_are_the_same(
    cells: int, kind: str, n_threads: int, threads: Callable[[int], None]
) -> None:
    threads(n_threads)
    made, other = (Made(n, zinb=True, thetas=1, biases=1) for n in (cells, cells + 5))
    weight_B = torch.linspace(0.1, 2.0, cells)

    def losses() -> Tensor:
        value = made.head()
        if kind == "uneven":
            return (value * weight_B).sum()
        if kind == "twice":  # a scale that was not expected
            return 2 * value.mean()
        if kind == "two batches":  # of the same weights
            logits, dropout = (
                Logits(other.h.detach(), one.weight_GH, one.table_KG)
                for one in (made.logits, made.dropout or made.logits)
            )
            more = head_log_likelihood(other.x, logits, other.library.detach(), made.theta, dropout)
            return value.mean() + 0.3 * more.mean()
        if kind == "not all":  # nobody asks for the gradients of the second
            made.head()
        if kind == "beside":  # the weights are used elsewhere, too
            return value.mean() + made.weight.square().sum()
        return value.mean()

    def both(*, later: bool) -> list[Tensor | None]:
        found = _gradients(made, losses, later=later)
        if kind == "more":  # a second part of a batch
            with gradients_later(allowed=later) as due:
                losses().backward()  # type: ignore[no-untyped-call]
                due.settle()
            return [leaf.grad for leaf in made.inputs]
        return found

    with alone():
        wanted, found = both(later=False), both(later=True)
    for exact, one in zip(wanted, found, strict=True):
        assert exact is not None
        assert one is not None
        torch.testing.assert_close(one, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


def test_a_weight_with_a_hook_gets_its_gradient_from_the_backward_pass(threads: Callable[[int], None]) -> None:
    threads(2)
    made = Made(40, zinb=True, thetas=1, biases=1)
    wanted = _gradients(made, lambda: made.head().mean(), later=False)[1]
    made.weight.register_hook(lambda gradient: 2 * gradient)  # type: ignore[no-untyped-call]
    with gradients_later() as due:
        for one in made.inputs:
            one.grad = None
        made.head().mean().backward()  # type: ignore[no-untyped-call]
        assert not due.dues
    assert wanted is not None
    torch.testing.assert_close(made.weight.grad, 2 * wanted)


def test_a_weight_that_is_frozen_gets_no_gradient_later(threads: Callable[[int], None]) -> None:
    threads(2)
    made = Made(40, zinb=True, thetas=1, biases=1)
    made.weight.requires_grad_(False)
    made.inputs = [one for one in made.inputs if one is not made.weight]
    found = _gradients(made, lambda: made.head().mean(), later=True)
    assert made.weight.grad is None
    assert all(one is not None for one in found)


@pytest.mark.parametrize("told", [1 / 130, 0.7])  # as it comes back, and not
@pytest.mark.parametrize("shared", [True, False])
def test_a_weight_that_is_told_ahead_changes_no_gradient(told: float, shared: bool) -> None:
    made = Made(130, zinb=True, thetas=1 if shared else 3, biases=1 if shared else 4)
    with a_cell_weighs(told):
        found = made.head()
    both = [torch.autograd.grad(-value.mean(), made.inputs) for value in (made.plain(), found)]
    for exact, one in zip(*both, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-4, atol=2e-6 * float(exact.abs().max()))


def test_the_number_of_threads_changes_no_bit() -> None:
    made, before = Made(700, zinb=True, thetas=1, biases=1), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            value = made.head()
            # of the products torch itself decides how they are cut; what we sum is theta and the biases
            gradients = torch.autograd.grad(value.mean(), [made.theta, made.library, made.table, made.more_table])
            found.append([value.detach(), *gradients])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cells", [40, 150, 700])  # genes dealt to threads, genes dealt to both, cells dealt to both
@pytest.mark.parametrize("shared", [True, False])
def test_threads_find_the_same_gradients(cells: int, kind: torch.dtype, shared: bool) -> None:
    made, before = Made(cells, zinb=True, thetas=1 if shared else 3, biases=1 if shared else 4), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with products_in(kind):
                value = made.head()
            found.append([value.detach(), *torch.autograd.grad(value.mean(), made.inputs)])
    finally:
        torch.set_num_threads(before)
    rtol = 1e-5 if kind == torch.float32 else 2e-2  # a part of a sum is rounded to bfloat16, too
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(other, one, rtol=rtol, atol=rtol * float(one.abs().max()))


def test_a_second_backward_pass_is_refused() -> None:
    made = Made(40, zinb=True, thetas=1, biases=1)
    loss = made.head().mean()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_bfloat16_is_near_and_float32_where_it_matters() -> None:
    made = Made(700, zinb=True, thetas=1, biases=1)
    wanted = torch.autograd.grad(made.head().mean(), made.inputs)
    with products_in(torch.bfloat16):
        value = made.head()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, made.head(), rtol=5e-3, atol=0)
    for exact, one in zip(wanted, torch.autograd.grad(value.mean(), made.inputs), strict=True):
        assert one.dtype == torch.float32
        assert float((one - exact).norm()) < 0.01 * float(exact.norm())


@pytest.mark.parametrize("where", ["h", "theta", "table", "more_weight"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden(where: str, kind: torch.dtype) -> None:
    made = Made(40, zinb=True, thetas=1, biases=1)
    with torch.no_grad():
        getattr(made, where).view(-1)[3] = torch.nan
    with products_in(kind):
        value = made.head()
    assert value.isnan().any()
    gradients = torch.autograd.grad(value.sum(), made.inputs)
    assert any(not one.isfinite().all() for one in gradients)


def test_without_gradients_the_value_is_the_same() -> None:
    made = Made(70, zinb=True, thetas=1, biases=1)
    wanted = made.head().detach()
    with torch.no_grad():
        found = made.head()
    assert not found.requires_grad
    assert torch.equal(found, wanted)


def test_a_code_without_a_row_is_refused() -> None:
    made = Made(3, zinb=False, thetas=1, biases=2)
    wrong = Logits(made.h, made.weight, made.table, torch.tensor([0, 1, 2]))
    with pytest.raises(IndexError, match="table with 2 rows"):
        head_log_likelihood(made.x, wrong, made.library, made.theta, None)


@pytest.mark.parametrize("sizes", [{}, {"batch": 3}, {"batch": 3, "donor": 2}])
def test_a_layer_that_is_not_computed_yet(sizes: dict[str, int]) -> None:
    generator = seeded("layer")
    layer: Any = ConditionalLinear(HIDDEN, GENES, sizes, generator) if sizes else Linear(HIDDEN, GENES, generator)
    h = torch.randn(7, HIDDEN)
    codes = {name: torch.arange(7) % n for name, n in sizes.items()}
    wanted = layer(h, codes) if sizes else layer(h)
    torch.testing.assert_close(logits_of(layer, h, codes).tensor(), wanted)
