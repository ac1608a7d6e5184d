"""Adam for rows that belong to different runs: each has moments, a step count and a learning rate of its own.

Adam works element by element, so a row that is trained among others takes the path that it would take alone, as
long as nothing of it is shared: the correction of the moments' bias depends on how many steps *this* row has had.
The numbers are those of `torch.optim.Adam` (beta 0.9 and 0.999, an L2 term inside the gradient); each operation is
one that rounds exactly, so that a row's bits do not depend on where in a table it stands.

Shapes: R rows of one table, H values of a row, Q runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scarcade.engine.optim import OptimConfig

BETA_1, BETA_2 = 0.9, 0.999


@dataclass
class Moments:
    """What Adam keeps of a table of rows."""

    first_RH: Tensor
    second_RH: Tensor

    @classmethod
    def of(cls, rows_RH: Tensor) -> "Moments":
        return cls(torch.zeros_like(rows_RH), torch.zeros_like(rows_RH))


@torch.no_grad()
def update_(
    rows_RH: Tensor,
    gradient_RH: Tensor,
    moments: Moments,
    owner_R: Tensor,
    steps: Sequence[int],
    rates: Sequence[float],
    config: OptimConfig,
) -> None:
    """One step, in place.

    Args:
        owner_R: int64, whose each row is.
        steps: of each run (Q,), this one included. rates: its learning rate.
    """

    def of_rows(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=rows_RH.dtype, device=rows_RH.device)[owner_R, None]

    if config.weight_decay:
        gradient_RH = gradient_RH + rows_RH * config.weight_decay
    moments.first_RH.mul_(BETA_1).add_(gradient_RH * (1 - BETA_1))
    moments.second_RH.mul_(BETA_2).add_((gradient_RH * gradient_RH) * (1 - BETA_2))
    size_R1 = of_rows([rate / (1 - BETA_1**step) for rate, step in zip(rates, steps, strict=True)])
    root_R1 = of_rows([(1 - BETA_2**step) ** 0.5 for step in steps])
    rows_RH.sub_(size_R1 * (moments.first_RH / (moments.second_RH.sqrt() / root_R1 + config.eps)))
