"""Gradients that are still being made when the backward pass is over."""

import pytest
import torch

from scarcade.engine import later
from scarcade.engine.later import gradients_later


def test_outside_of_the_block_nothing_may_be_left() -> None:
    assert later.now() is None
    with gradients_later() as open_:
        assert later.now() is open_
        with gradients_later(allowed=False):
            assert later.now() is None
        assert later.now() is open_
    assert later.now() is None


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("before", [None, 3.0])
def test_a_gradient_is_taken_when_it_is_there_and_is_added(before: float | None, scale: float) -> None:
    weight, gradient, waited = torch.zeros(2, requires_grad=True), torch.zeros(2), []
    if before is not None:
        weight.grad = torch.full((2,), before)

    def wait() -> None:
        waited.append(True)
        gradient.fill_(4.0)

    with gradients_later() as open_:
        due = open_.expect(weight, gradient, wait)
        due.wanted, due.scale = True, scale
        assert not waited
        open_.settle()
    assert waited == [True]
    assert weight.grad is not None
    assert weight.grad.tolist() == [4.0 * scale + (before or 0.0)] * 2


def test_what_no_backward_pass_wants_is_waited_for_and_not_taken() -> None:
    weight, waited = torch.zeros(2, requires_grad=True), []
    with gradients_later() as open_:
        open_.expect(weight, torch.ones(2), lambda: waited.append(True))
        open_.settle()
        open_.settle()
    assert weight.grad is None
    assert waited == [True]
