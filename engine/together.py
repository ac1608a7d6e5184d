"""Puts the rows of all workers together, for statistics of a global batch that are no sum over its cells.

An MMD of half a batch is not half the MMD. So each worker gathers the few numbers that such a statistic is of (the
latent, the conditions; never the counts) and computes all of it. The gradient needs no collective: every worker finds
the same scalar of the same rows, and knows its derivative by its own rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scarcade.engine.contracts import Batch
from scarcade.engine.world import World


def with_others(batch: Batch, world: World) -> Batch:
    """`batch` with a `Batch.together` that reaches all workers of `world`."""
    return batch if world.size == 1 else replace(batch, together=Together(world, len(batch)))


class Together:
    """`Batch.together` of one batch of `n_cells` on one of many workers."""

    def __init__(self, world: World, n_cells: int) -> None:
        self._world, self._n_cells = world, n_cells
        self._sizes: list[int] | None = None  # asked for once, and only if there is something to gather

    def __call__(self, rows: Tensor) -> Tensor:
        """(n_global, ...) from this worker's (B, ...)."""
        if self._sizes is None:
            self._sizes = self._world.sizes(self._n_cells)
        gathered: Tensor = _Gathered.apply(rows, self._world, self._sizes)  # type: ignore[no-untyped-call]
        return gathered


class _Gathered(torch.autograd.Function):
    """Rows of one worker -> rows of all of them.

    The loop takes a penalty's mean over workers, each of which finds the same one; so the gradient of the own rows
    counts once for each worker.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, sizes: Sequence[int]) -> Tensor:
        ctx.first, ctx.n, ctx.times = sum(sizes[: world.rank]), sizes[world.rank], world.size
        return world.gathered(rows, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.first : ctx.first + ctx.n] * ctx.times, None, None
