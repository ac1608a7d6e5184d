"""Proximal steps against straightforward code and numbers of scArches."""

import pytest
import torch

from scarcade.models.proximal import annealed, shrink_, shrink_groups_


def test_group_lasso_of_scarches() -> None:
    weight = torch.tensor([[3.0, 0.1, 0.0], [4.0, 0.2, 0.0]])
    one, each = weight.clone(), weight.clone()
    shrink_groups_(one, torch.tensor([1.0, 1.0, 1.0]))
    torch.testing.assert_close(one, torch.tensor([[2.4, 0, 0], [3.2, 0, 0]]))
    shrink_groups_(each, torch.tensor([0.5, 0.1, 1.0]))
    torch.testing.assert_close(each, torch.tensor([[2.7, 0.055279, 0], [3.6, 0.110557, 0]]), rtol=1e-5, atol=1e-6)


def test_group_lasso_is_the_loop_over_groups() -> None:
    weight = torch.randn(30, 12, generator=torch.Generator().manual_seed(3))
    threshold = torch.linspace(0, 9, 12)
    wanted = weight.clone()
    for t in range(12):
        norm = wanted[:, t].norm()
        wanted[:, t] = wanted[:, t] * (1 - threshold[t] / norm) if norm > threshold[t] else 0
    shrink_groups_(weight, threshold)
    torch.testing.assert_close(weight, wanted)
    assert 0 < (wanted == 0).all(0).sum() < 12


def test_lasso_of_scarches() -> None:
    weight = torch.tensor([[0.3, -0.05], [-0.3, 0.05]])
    inside = torch.tensor([[1.0, 0], [0, 0]])
    shrink_(weight, 0.1, where=inside == 0)
    torch.testing.assert_close(weight, torch.tensor([[0.3, 0], [-0.2, 0]]))
    shrink_(weight, 0.25)
    torch.testing.assert_close(weight, torch.tensor([[0.05, 0], [0, 0]]))


def test_annealing_in_stairs() -> None:
    assert annealed(3, None, 5) == 1
    assert [annealed(epoch, 10, 5) for epoch in (0, 4, 5, 9, 10, 99)] == pytest.approx([0.1, 0.1, 0.5, 0.5, 1, 1])
