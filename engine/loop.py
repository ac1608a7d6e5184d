"""`fit`: the one training loop, on one process or many, resumable between any two steps.

What a step does is a function of (weights, moments, seed, position): the loader gives the cells of a
position, `Noise.of_step` their noise, and `TrainingState` is all that the loop itself remembers. So a run
that is killed anywhere and continued from a checkpoint ends with the same bits.
"""

import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from scarcade.engine.contracts import Batch, Loader, Model, Step
from scarcade.engine.metrics import Clock, Line, MetricsFile, Report, means
from scarcade.engine.optim import (
    OptimConfig,
    default_epochs,
    kl_weight,
    moments,
    restore_moments,
)
from scarcade.engine.profile import LOADING, Stopwatch
from scarcade.engine.state import Checkpointing, FitResult, TrainingState
from scarcade.engine.updates import Updates, unwatched
from scarcade.engine.validation import validate
from scarcade.engine.world import World

FitConfig = OptimConfig
_OPTIMISER = "optimiser:"
_WEIGHTS = "model:"


def fit(
    model: nn.Module,
    train: Loader,
    validation: Loader | None,
    config: OptimConfig,
    *,
    world: World | None = None,
    seed: int = 0,
    checkpoints: Checkpointing | None = None,
    metrics: MetricsFile | None = None,
    progress: Report | None = None,
    stop: Callable[[], bool] | None = None,
    watch: Stopwatch | None = None,
) -> FitResult:
    """Train `model`, from the newest checkpoint if there is one.

    Only parameters with ``requires_grad`` move. The loss is the mean over the cells of the global batch,
    whatever the number of workers. The model is left in eval mode.

    Args:
        train, validation: this worker's loaders (``world.shard``) of the same store.
        checkpoints: where to commit and resume; none: nothing is kept.
        metrics: where lines of metrics go, written by rank 0. `progress` is given the same lines.
        stop: asked in each step; once it says True on any worker, all of them stop together, commit a
            checkpoint and return "interrupted".
        watch: is told which part of the work begins.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the update was not made.
        UsageError: nothing trains, or the monitored term is not one of the model's.
    """
    world = world or World()
    run = Run(model.to(world.device), train, validation, config, world=world, seed=seed)
    run.checkpoints, run.metrics, run.progress, run.stop = checkpoints, metrics, progress, stop
    if watch is not None:
        run.turn_to = watch.to
        run.updates.watched_by(watch.to)
    try:
        run.begin()
        began_at = run.state.step
        while not run.is_over():
            if not run.epoch():
                return run.result("interrupted")
        if run.state.step > began_at:  # else it was over before
            run.save()
        return run.result(run.state.stopped)
    finally:
        run.close()
        model.eval()


class Run:
    """The state of one `fit`: model, optimiser, position.

    Whoever decides between two epochs whether to go on (a trial of a search) drives it by itself, as `fit` does.
    """

    checkpoints: Checkpointing | None = None
    metrics: MetricsFile | None = None
    progress: Report | None = None
    stop: Callable[[], bool] | None = None

    def __init__(
        self,
        model: nn.Module,
        train: Loader,
        validation: Loader | None,
        config: OptimConfig,
        *,
        world: World,
        seed: int,
    ) -> None:
        self.model, self.train, self.validation = model, train, validation
        self.config, self.world, self.seed = config, world, seed
        self.contract = cast(Model, model)
        self.n_cells = train.n_cells + (validation.n_cells if validation else 0)
        self.epochs = config.epochs or default_epochs(self.n_cells)
        self.updates = Updates(model, config, world, seed)
        self.optimiser, self.names = self.updates.optimiser, self.updates.names
        self.state = TrainingState(lr=config.lr)
        self.clock = Clock(train.waited, 0)
        self.turn_to: Callable[[str], None] = unwatched

    # beginning

    def begin(self) -> None:
        """Take up the newest checkpoint, or the first weights of rank 0; then all ranks agree."""
        found = self.checkpoints.load() if self.checkpoints is not None and self.world.first else None
        if self.world.say({"found": found is not None})["found"]:
            self._resume(*(found or ({}, {})))
        else:
            if getattr(self.model, "observes", False):
                batches = chain(self.train.epoch(0), self.validation.epoch(0) if self.validation else ())
                cast(Any, self.model).observe(batches, total=self.world.sum)
            self.world.from_first(list(self.model.state_dict().values()))
        if self.metrics is not None and self.world.first:
            self.metrics.rewind(self.state.step)
        state = self.state
        over = state.stopped == "early" or state.epoch >= self.epochs or self._at_last_step()
        if state.stopped and not over:
            state.stopped = ""  # more epochs or steps were asked for
        elif over and not state.stopped:
            state.stopped = "steps" if self._at_last_step() else "epochs"
        self.clock = Clock(self.train.waited, state.cells)

    def _resume(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        shared = self.world.say({"state": state, "moments": any(k.startswith(_OPTIMISER) for k in tensors)})
        if tensors:  # rank 0
            self.model.load_state_dict(
                {k.removeprefix(_WEIGHTS): v for k, v in tensors.items() if k.startswith(_WEIGHTS)}
            )
            saved = {k.removeprefix(_OPTIMISER): v for k, v in tensors.items() if k.startswith(_OPTIMISER)}
            restore_moments(self.optimiser, self.names, saved)
        elif shared["moments"]:
            blank: dict[str, Tensor] = {}
            for name, p in zip(self.names, self.updates.parameters, strict=True):
                blank |= {f"{name}/exp_avg": torch.zeros_like(p), f"{name}/exp_avg_sq": torch.zeros_like(p)}
                blank[f"{name}/step"] = torch.zeros(())
            restore_moments(self.optimiser, self.names, blank)
        self.world.from_first([*self.model.state_dict().values(), *moments(self.optimiser, self.names).values()])
        self.state = TrainingState.from_dict(shared["state"])
        self.optimiser.lr = self.state.lr

    # running

    def epoch(self) -> bool:
        """The rest of the current epoch; False if the run was asked to stop in it."""
        state, steps = self.state, self.train.steps_per_epoch
        self.model.train(self.config.mode == "train")
        self.turn_to(LOADING)
        if state.in_epoch < steps and not self._at_last_step():
            for batch in self.train.epoch(state.epoch, state.in_epoch):
                save, interrupted = self._step(batch)
                at_end = state.in_epoch == steps
                if state.step % self.config.log_every == 0 and not at_end:
                    self._line()  # before a checkpoint, whose next line would count this one's cells again
                if interrupted:
                    self.save()
                    return False
                if self._at_last_step():
                    break
                if save and not at_end:
                    self.save()
                self.turn_to(LOADING)
        self.updates.drain()
        if state.in_epoch == steps:
            self._end_of_epoch()
        if self._at_last_step():
            state.stopped = state.stopped or "steps"
        elif state.epoch >= self.epochs:
            state.stopped = state.stopped or "epochs"
        return True

    def close(self) -> None:
        """Let go of what would keep it in memory: hooks of the parameters, records of its steps."""
        self.updates.close()

    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        return bool(self.state.stopped)

    def _at_last_step(self) -> bool:
        return self.config.max_steps is not None and self.state.step >= self.config.max_steps

    def _step(self, batch: Batch) -> tuple[bool, bool]:
        """One update. Returns (whether to save, whether to stop), the same on all ranks."""
        state, world = self.state, self.world
        where = Step(
            state.step,
            state.epoch,
            state.cells,
            kl_weight(self.config, epoch=state.epoch, step=state.step, cells=state.cells),
            state.lr,
        )
        asked = (
            float(world.first and self.checkpoints is not None and self.checkpoints.due(state.step + 1)),
            float(self.stop is not None and self.stop()),
        )
        asked_of = self.updates.take(batch, where, asked)
        self.contract.after_step(where)
        state.step += 1
        state.in_epoch += 1
        state.cells += batch.n_global
        return asked_of

    # what is read back now and then

    def _gather(self) -> None:
        """Bring the device's sums, over all ranks, into the state."""
        sums, cells = self.updates.summed().merged(self.world)
        state = self.state
        for name in ("since_line", "since_epoch"):
            old, n = getattr(state, name)
            setattr(state, name, ({k: old.get(k, 0.0) + sums.get(k, 0.0) for k in {**old, **sums}}, n + cells))

    def _line(self) -> None:
        """A line of metrics within an epoch."""
        self._gather()
        self._write({**self._where("steps"), **means(*self.state.since_line, "train")})
        self.state.since_line = ({}, 0)

    def _end_of_epoch(self) -> None:
        state, config = self.state, self.config
        self.turn_to("metrics")
        self._gather()
        line = {**self._where("epoch"), **means(*state.since_epoch, "train")}
        if self.validation is not None and config.validate_every and (state.epoch + 1) % config.validate_every == 0:
            self.turn_to("validation")
            found = validate(self.model, self.validation, self._now(), seed=self.seed, world=self.world)
            line |= found
            state.watch(found, config)
            self.optimiser.lr = state.lr
            self.turn_to("metrics")
        state.since_line = state.since_epoch = ({}, 0)
        state.history.append(line)
        state.epoch, state.in_epoch = state.epoch + 1, 0
        self._write(line)

    def _now(self) -> Step:
        """Where training stands in its last step."""
        state = self.state
        step, cells = max(state.step - 1, 0), max(state.cells - 1, 0)
        weight = kl_weight(self.config, epoch=state.epoch, step=step, cells=cells)
        return Step(step, state.epoch, cells, weight, state.lr)

    def _where(self, of: str) -> Line:
        state = self.state
        return {
            "time": round(time.time(), 3),
            "step": state.step,
            "epoch": state.epoch,
            "cells": state.cells,
            **self.clock.read(self.train.waited, state.cells),
            "of": of,
            "lr": state.lr,
            "kl_weight": self._now().kl_weight,
        }

    def _write(self, line: Line) -> None:
        if not self.world.first:
            return
        if self.metrics is not None:
            self.metrics.write(line)
        if self.progress is not None:
            self.progress({**line, "epochs": self.epochs, "steps_per_epoch": self.train.steps_per_epoch})

    def save(self) -> None:
        """Commit where the run stands."""
        if self.checkpoints is None:
            return
        self.turn_to("checkpoint")
        self.updates.drain()
        self._gather()
        tensors = {f"{_WEIGHTS}{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"{_OPTIMISER}{k}": v for k, v in moments(self.optimiser, self.names).items()}
        self.checkpoints.save(self.state.step, self.state.to_dict(), tensors)

    def result(self, stopped: str) -> FitResult:
        state = self.state
        return FitResult(list(state.history), state.step, state.epoch, state.cells, stopped)
