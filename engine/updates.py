"""`Updates`: one update of the weights for each step, on a CPU, or on a GPU that is never waited for.

On a GPU the host is a step ahead: what it must know of a step (is it finite, was a checkpoint asked for, or an end) it
reads one step later, and the learning rate and what is not finite are numbers there. Steps that can be recorded
are replayed (`recorded`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from scarcade.engine.contracts import Batch, Losses, Model, Noise, Step
from scarcade.engine.errors import NonFiniteError
from scarcade.engine.finite import finite_where
from scarcade.engine.gradients import GradientSum
from scarcade.engine.later import gradients_later
from scarcade.engine.metrics import Sums
from scarcade.engine.optim import OptimConfig, adam
from scarcade.engine.parts import parts_of
from scarcade.engine.pool import as_shared_by
from scarcade.engine.precision import products_in
from scarcade.engine.readback import Readback
from scarcade.engine.recorded import Asked, Recorder, can_be_recorded
from scarcade.engine.state import check_monitor
from scarcade.engine.together import with_others
from scarcade.engine.weighing import a_cell_weighs
from scarcade.engine.world import World

_Tag = tuple[int, int, np.ndarray]  # step, epoch, rows


def unwatched(part: str) -> None:
    """Where no stopwatch runs."""


class Updates:
    """The optimiser of a model, and what a step sums up beside the gradients."""

    def __init__(self, model: nn.Module, config: OptimConfig, world: World, seed: int) -> None:
        self.model, self.config, self.world, self.seed = model, config, world, seed
        self.contract = cast(Model, model)
        self.products = getattr(torch, config.products)
        self.optimiser, self.names = adam(model, config)
        self.parameters: list[nn.Parameter] = self.optimiser.parameters
        self.moves_if_finite = config.clip is None and self.optimiser.can_step_if_finite
        self.gradients = GradientSum(model, world, signals=3)
        self.readback: Readback[_Tag] = Readback(world.device)
        self.bad = torch.zeros((), device=world.device)  # on a GPU: 1 once a step was not finite
        self.nothing = torch.zeros(2, device=world.device)
        self.lr_there: tuple[float, Tensor] | None = None
        self.recorder: Recorder | None = None
        if config.record and can_be_recorded(model, world.device, world.size, config.accumulate):
            self.recorder = Recorder(self._to_record)
        self.sums = Sums()
        self.turn_to: Callable[[str], None] = unwatched

    def watched_by(self, turn_to: Callable[[str], None]) -> None:
        """Tell which part of the work begins: of a step that is replayed nobody can."""
        self.turn_to, self.recorder = turn_to, None

    def take(self, batch: Batch, where: Step, asked: Asked) -> tuple[bool, bool]:
        """The update of a step. Returns (whether to save, whether to stop), the same on all ranks.

        Raises:
            NonFiniteError: this step, or on a GPU the one before, is not finite.
        """
        self.turn_to("copying")
        batch = batch.to(self.world.device)
        numbers = None if self.recorder is None else self.recorder.step(batch, where, self.seed, asked)
        if numbers is None:
            with as_shared_by(self.model):
                return self._asked_for(batch, where, asked)
        return self._check(self.readback.exchange(numbers, (where.step, where.epoch, batch.rows)))

    def drain(self) -> None:
        """Wait for the last step.

        Raises:
            NonFiniteError: it was not finite.
        """
        self._check(self.readback.drain())

    def summed(self) -> Sums:
        """What was summed up since it was last emptied."""
        if self.recorder is not None:
            self.recorder.hand_over(self.sums)
        return self.sums

    def close(self) -> None:
        """Let go of what would keep it in memory: hooks of the parameters, records of its steps."""
        self.gradients.close()
        self.recorder = None

    def _asked_for(self, batch: Batch, where: Step, asked: tuple[float, float]) -> tuple[bool, bool]:
        """One update, each operation asked for by itself."""
        device = self.world.device
        if self.readback.deferred:  # as a record has it: what is made of it has the same bits
            where = replace(where, kl_weight=torch.full((), float(where.kl_weight), device=device))
        self.optimiser.zero_grad()
        n_parts, found = self.config.accumulate, []
        loss = torch.zeros((), device=device)
        for number, part in enumerate(parts_of(batch, n_parts), 1):
            part = with_others(part, self.world)
            self.turn_to("forward")
            with gradients_later(self.world.size == 1) as later:
                losses, of_part = self._losses(part, where, Noise.of_step(self.seed, where.step, part, device))
                self.turn_to("backward")
                with self.gradients.held() if number < n_parts else nullcontext():
                    of_part.backward()  # type: ignore[no-untyped-call]
                later.settle()
            loss = of_part.detach() if n_parts == 1 else loss + of_part.detach()
            found.append(losses if n_parts == 1 else losses.detached())
        if self.readback.deferred:
            own = torch.cat([loss.reshape(1), self._there(asked)])
        else:
            own = torch.tensor((loss.item(), *asked), device=device)
        self.turn_to("all-reduce")
        shared = self.gradients.finish(own, len(batch) / batch.n_global)
        self.turn_to("optimiser")
        tag = where.step, where.epoch, batch.rows
        if self.readback.deferred:
            number_of_all = self._update_on_gpu(shared[0], self._lr_there(where.lr))
            read = self.readback.exchange(torch.cat([number_of_all.reshape(1), shared[1:]]), tag)
            asked_of = self._check(read)
        else:
            finite, *told = shared.tolist()
            if self.moves_if_finite and np.isfinite(finite):
                finite += 0.0 if self.optimiser.step_if_finite() else np.nan
                asked_of = self._check(([finite, *told], tag))
            else:
                norm = self._norm()
                asked_of = self._check(([finite + norm.item(), *told], tag))
                self._update(norm)
        self.turn_to("metrics")
        for losses in found:
            self.sums.add(losses)
        return asked_of

    def _norm(self) -> Tensor:
        """Finite where all gradients are; their norm if they are clipped by it."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return finite_where(gradients) if self.config.clip is None else torch.nn.utils.get_total_norm(gradients)

    def _update(self, norm: Tensor) -> None:
        if self.config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        self.optimiser.step()

    def _update_on_gpu(self, loss: Tensor, lr: Tensor) -> Tensor:
        """Update, unless a number of this step, or of one before it, is not finite; what tells whether one is."""
        norm = self._norm()
        number = loss + norm
        self.bad.copy_(torch.maximum(self.bad, (~number.isfinite()).float()))
        self.optimiser.found_inf = self.bad
        self.optimiser.lr = lr
        self._update(norm)
        return number

    def _to_record(self, batch: Batch, where: Step, noise: Noise, lr: Tensor) -> tuple[Losses, Tensor]:
        """What a record is made of (`recorded.Compute`)."""
        self.optimiser.zero_grad()
        losses, loss = self._losses(batch, where, noise)
        loss.backward()  # type: ignore[no-untyped-call]
        self.gradients.finish(loss, 1.0)
        return losses, self._update_on_gpu(loss.detach(), lr)

    def _lr_there(self, lr: float) -> Tensor:
        """The learning rate on the GPU."""
        if self.lr_there is None or self.lr_there[0] != lr:
            self.lr_there = lr, torch.full((), lr, device=self.world.device)
        return self.lr_there[1]

    def _there(self, asked: tuple[float, float]) -> Tensor:
        """What is asked in this step, on the GPU, which is not waited for: hardly ever anything but zeros."""
        if not any(asked):
            return self.nothing
        return torch.tensor(asked, pin_memory=True).to(self.world.device, non_blocking=True)

    def _losses(self, part: Batch, where: Step, noise: Noise) -> tuple[Losses, Tensor]:
        """The losses of a part of a batch, and what it adds to the loss of the step."""
        with products_in(self.products), a_cell_weighs(1 / part.n_global):
            losses: Losses = self.contract.losses(part, where, noise)
        if where.step == 0:
            check_monitor(("loss", *losses.terms, *losses.labelled_terms), self.config)
        loss = losses.minimise.sum() / part.n_global
        if losses.penalty is not None:
            loss = loss + losses.penalty / (self.world.size * self.config.accumulate)
        if losses.labelled is not None and part.labelled is not None:
            loss = loss + losses.labelled.sum() / part.labelled.n_global
        return losses, loss

    def _check(self, read: tuple[list[float], _Tag] | None) -> tuple[bool, bool]:
        """Raise if the step that was read was not finite; else (save, stop)."""
        if read is None:
            return False, False
        (finite, save, stop), (step, epoch, rows) = read
        if not np.isfinite(finite):
            shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            raise NonFiniteError(
                f"step {step}: the loss or its gradient is not finite, and the update was not made "
                f"(epoch {epoch}, rows {shown} of the store); lower --optim.lr or set --optim.clip, "
                "and check these cells"
            )
        return save > 0, stop > 0
