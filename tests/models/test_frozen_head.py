"""The head of a frozen decoder: the numbers of the plain formula, without what a frozen decoder does not need."""

import numpy as np
import pytest
import torch
from torch import Tensor

from scarcade.models.distributions import elements
from scarcade.models.frozen_head import BLOCK, FrozenHead, why_not
from scarcade.models.layers import Linear, seeded
from scarcade.models.sparse import Sparse
from scarcade.models.trained_head import Logits, head_log_likelihood
from tests.models.cells import DenseCounts

HIDDEN, GENES = 16, 57


def made_head(*, zinb: bool) -> FrozenHead:
    generator = seeded("frozen head", zinb)
    scale = Linear(HIDDEN, GENES, generator).requires_grad_(False)
    dropout = Linear(HIDDEN, GENES, generator).requires_grad_(False) if zinb else None
    return FrozenHead(scale, dropout, torch.randn(GENES, generator=generator) * 1.5)


def made_cells(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden units, counts (some of them large, some cells empty) and log library sizes."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, HIDDEN, generator=g).relu()
    x = torch.poisson(torch.rand(n, GENES, generator=g) ** 6 * 40, g)
    x[:, 0] *= 300
    if n > 1:
        x[n // 2] = 0
    return h, x, x.sum(1).log()


def exact(head: FrozenHead, h: Tensor, x: Tensor, log_library: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """By the plain formula in float64: log p of each cell, and the gradient of their weighted sum."""
    h = h.double().requires_grad_(True)
    logits = h @ head.scale.weight.double().T + head.scale.bias.double()
    dropout = None
    if head.dropout is not None:
        dropout = h @ head.dropout.weight.double().T + head.dropout.bias.double()
    rate = log_library.double().exp()[:, None] * torch.softmax(logits, -1)
    theta = head.log_theta_G.double()
    value = elements("nb" if dropout is None else "zinb", x.double(), rate, theta, dropout).sum(-1)
    torch.autograd.backward([(value * weight).sum()])
    assert h.grad is not None
    return value.detach(), h.grad


@pytest.mark.parametrize("zinb", [False, True])
@pytest.mark.parametrize("n", [1, 33, BLOCK, 2 * BLOCK + 77])
def test_equals_the_formula(n: int, zinb: bool) -> None:
    head, (h, x, log_library) = made_head(zinb=zinb), made_cells(n)
    weight = torch.linspace(0.1, 2.0, n)
    counts = DenseCounts(x)
    h = h.requires_grad_(True)
    value = head.log_p(h, counts, log_library, head.constants(counts))
    torch.autograd.backward([(value * weight).sum()])
    wanted, gradient = exact(head, h.detach(), x, log_library, weight.double())
    torch.testing.assert_close(value.detach().double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert h.grad is not None
    torch.testing.assert_close(h.grad.double(), gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


class AllKept(DenseCounts):
    """Counts whose zeros are stored, as some tools write them."""

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, n_genes = self.shape
        x = self.dense(torch.device("cpu")).numpy()
        return np.arange(n + 1) * n_genes, np.tile(np.arange(n_genes), n), x.reshape(-1)


@pytest.mark.parametrize("zinb", [False, True])
def test_zeros_that_are_stored_are_zeros(zinb: bool) -> None:
    head, (h, x, log_library) = made_head(zinb=zinb), made_cells(40)
    found = []
    for counts in (DenseCounts(x), AllKept(x)):
        one = h.clone().requires_grad_(True)
        value = head.log_p(one, counts, log_library, head.constants(counts))
        (gradient,) = torch.autograd.grad(value.sum(), one)
        logits = Logits(one, head.scale.weight, head.scale.bias[None])
        dropout = None if head.dropout is None else Logits(one, head.dropout.weight, head.dropout.bias[None])
        trained = head_log_likelihood(Sparse.of(counts), logits, log_library, head.log_theta_G, dropout)
        found.append((value.detach(), gradient, trained.detach()))
    for wanted, other in zip(*found, strict=True):
        torch.testing.assert_close(other, wanted)


@pytest.mark.parametrize("zinb", [False, True])
def test_a_cell_has_the_same_bits_in_any_company(zinb: bool) -> None:
    head, (h, x, log_library) = made_head(zinb=zinb), made_cells(300)
    whole = head.log_p(h, DenseCounts(x), log_library, head.constants(DenseCounts(x)))
    for first, last in ((0, 40), (100, 133), (90, 290)):
        part = DenseCounts(x[first:last])
        alone = head.log_p(h[first:last].clone(), part, log_library[first:last], head.constants(part))
        assert torch.equal(alone, whole[first:last])


@pytest.mark.parametrize("zinb", [False, True])
def test_what_is_not_finite_stays_so_and_spreads_to_no_other_cell(zinb: bool) -> None:
    head, (h, x, log_library) = made_head(zinb=zinb), made_cells(40)
    counts = DenseCounts(x)
    fine = head.log_p(h, counts, log_library, head.constants(counts))
    broken = h.clone()
    broken[7, 3] = float("nan")
    broken = broken.requires_grad_(True)
    value = head.log_p(broken, counts, log_library, head.constants(counts))
    torch.autograd.backward([value.sum()])
    assert value[7].isnan()
    assert broken.grad is not None
    assert broken.grad[7].isnan().all()
    others = np.delete(np.arange(40), 7)
    assert torch.equal(value[others].detach(), fine[others])
    assert broken.grad[others].isfinite().all()


def test_an_infinite_count_has_no_likelihood() -> None:
    head, (h, x, _) = made_head(zinb=False), made_cells(4)
    x[1, 5] = float("inf")
    counts = DenseCounts(x)
    value = head.log_p(h, counts, x.sum(1).log(), head.constants(counts))
    assert value[1].isnan()
    assert value[[0, 3]].isfinite().all()


def test_it_is_for_heads_that_are_frozen() -> None:
    head = made_head(zinb=True)
    assert why_not(head) is None
    head.scale.requires_grad_(True)
    assert "trained" in (why_not(head) or "")
    assert "float64" in (why_not(FrozenHead(head.scale.double(), None, head.log_theta_G)) or "")
