"""Gradients of weights that other threads still compute while the backward pass goes on.

Nobody waits for the gradient of a weight but the optimiser, and much of the way back through a decoder and an encoder
is small operations of one thread. Within `gradients_later` a function may return none for a weight that `can_wait`, and
leave it here; `Later.settle` waits for the crew, and adds it to the weight's ``.grad``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_now: ContextVar["Later | None"] = ContextVar("later", default=None)


@dataclass(eq=False, slots=True)
class Due:
    """A gradient that is being made: of no use before `Later.settle`, and of none if no backward pass wants it."""

    weight: Tensor
    gradient: Tensor
    wait: Callable[[], None]
    wanted: bool = False
    scale: float = 1.0


@dataclass(slots=True)
class Later:
    """What is due."""

    dues: list[Due] = field(default_factory=list)

    def expect(self, weight: Tensor, gradient: Tensor, wait: Callable[[], None]) -> Due:
        """`gradient` will be that of a loss by `weight`, a leaf, when `wait` returns."""
        self.dues.append(due := Due(weight, gradient, wait))
        return due

    @torch.no_grad()
    def settle(self) -> None:
        """Give every weight its gradient."""
        for due in self.dues:
            due.wait()
            if not due.wanted:
                continue
            gradient = due.gradient if due.scale == 1 else due.gradient.mul_(due.scale)
            due.weight.grad = gradient if due.weight.grad is None else due.weight.grad.add_(gradient)
        self.dues.clear()


def can_wait(weight: Tensor) -> bool:
    """Whether nothing of a backward pass comes after this weight's gradient: no other operation, and no hook."""
    given: Any = weight
    hooks = given._backward_hooks or getattr(given, "_post_accumulate_grad_hooks", None)
    return weight.is_leaf and not hooks


def now() -> Later | None:
    """Where to leave a gradient, if that is allowed."""
    return _now.get()


@contextmanager
def gradients_later(allowed: bool = True) -> Iterator[Later]:
    """Within the block gradients may be left for later; `settle` after the backward pass, within it."""
    later = Later()
    token = _now.set(later if allowed else None)
    try:
        yield later
    finally:
        _now.reset(token)
