"""Adam, by the fused kernel of torch, without `torch.optim`.

`torch.optim.Adam` imports torch's compiler when it is made and in each step, to tell it what not to compile. Nothing is
compiled here, and that import is two seconds of CPU at every start of a training, a mapping or a worker. The kernel is
the same, called with the same values, so the numbers are the same bits. On a CPU where threads can be had that do
without the interpreter, one job of theirs (`adam_job`) looks whether all gradients are numbers, and makes the update,
with the same formula.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scarcade.engine import adam_crew
from scarcade.engine.pool import alone, together

BETAS = (0.9, 0.999)
LARGE = 1 << 16  # numbers from which on threads share a parameter: torch has them share every one
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Adam:
    """Moves `parameters`, all of one device and kind, by their ``.grad``; one without a gradient stays.

    Attributes:
        lr: may be changed between two steps; a number, or on a GPU a float32 scalar there.
        state: what is kept of each parameter, by the names in `MOMENTS`; nothing before its first step.
        found_inf: a float32 scalar on the parameters' device; where it is 1, a step changes nothing.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, lr: float, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self.parameters = list(parameters)
        self.lr: float | Tensor = lr
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.found_inf: Tensor | None = None
        self._eps, self._weight_decay = eps, weight_decay
        self._moved: adam_crew.Moved | None = None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update, in place."""
        moved = [parameter for parameter in self.parameters if parameter.grad is not None]
        if not moved:
            return
        if self.parameters[0].device.type != "cpu":
            self._move(moved)
            return
        small = [parameter for parameter in moved if parameter.numel() < LARGE]
        with alone():
            self._move(small)
        with together():
            self._move([parameter for parameter in moved if parameter.numel() >= LARGE])

    @property
    def can_step_if_finite(self) -> bool:
        """Whether `step_if_finite` can be called here."""
        return adam_crew.can(self.parameters)

    @torch.no_grad()
    def step_if_finite(self) -> bool:
        """As `step`, if all gradients are numbers; else nothing changes, and it says False.

        The last bits may be others than those of `step`; they do not depend on the number of threads.
        """
        moved = [parameter for parameter in self.parameters if parameter.grad is not None]
        states = [self.state.get(parameter) or self._first(parameter) for parameter in moved]
        assert not isinstance(self.lr, Tensor)
        if not moved:
            return True
        if self._moved is None or not self._moved.are(moved, states):
            self._moved = adam_crew.Moved(moved, states, (self._eps, self._weight_decay, *BETAS))
        return self._moved.update(self.lr)

    def _move(self, moved: list[nn.Parameter]) -> None:
        if not moved:
            return
        kept = [self.state.get(parameter) or self._first(parameter) for parameter in moved]
        steps = [one["step"] for one in kept]
        torch._foreach_add_(steps, 1)
        fused: Any = torch._fused_adam_
        fused(
            moved,
            [parameter.grad for parameter in moved],
            [one["exp_avg"] for one in kept],
            [one["exp_avg_sq"] for one in kept],
            [],
            steps,
            amsgrad=False,
            lr=self.lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self._weight_decay,
            eps=self._eps,
            maximize=False,
            grad_scale=None,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def _first(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        self.state[parameter] = {
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        }
        return self.state[parameter]
