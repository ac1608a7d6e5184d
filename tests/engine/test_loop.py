import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.engine.errors import NonFiniteError, UsageError
from scarcade.engine.loop import fit
from scarcade.engine.metrics import MetricsFile
from scarcade.engine.optim import OptimConfig
from tests.engine.toy import ToyLoader, ToyModel, digest


class InMemory:
    """Checkpoints that are kept as values."""

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self.kept: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        return self.kept[-1] if self.kept else None

    def due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def save(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.kept.append((dict(state), {k: v.detach().clone() for k, v in tensors.items()}))


def test_training_lowers_the_validation_loss() -> None:
    result = fit(ToyModel(), ToyLoader(), ToyLoader(seed=1), OptimConfig(epochs=15, lr=0.01, kl_epochs=5))
    assert result.stopped == "epochs"
    assert (result.epochs, result.steps, result.cells) == (15, 15 * 7, 15 * 200)
    assert result.history[-1]["validation/elbo"] < result.history[0]["validation/elbo"] - 1
    assert [line["kl_weight"] for line in result.history[:6]] == [0, 0.2, 0.4, 0.6, 0.8, 1]


def test_the_loop_is_the_bare_loop() -> None:
    """The same weights as ten lines of plain torch."""
    bare, loader = ToyModel(), ToyLoader()
    optimiser = torch.optim.Adam(bare.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6, fused=True)
    step = 0
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            optimiser.zero_grad()
            where = Step(step, epoch, 0, epoch / 400)
            losses = bare.losses(batch, where, Noise.of_step(5, step, batch))
            (losses.minimise.sum() / batch.n_global).backward()  # type: ignore[no-untyped-call]
            for parameter in bare.idle.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimiser.step()
            step += 1
    ours = ToyModel()
    fit(ours, ToyLoader(), None, OptimConfig(epochs=2), seed=5)
    for mine, its in zip(ours.parameters(), bare.parameters(), strict=True):  # Adam's last bits may be others
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-7)
    clipped = ToyModel()  # nothing is, and it is torch's own kernel
    fit(clipped, ToyLoader(), None, OptimConfig(epochs=2, clip=1e9), seed=5)
    assert digest(clipped) == digest(bare)


@pytest.mark.parametrize("kept", range(8))
def test_a_run_that_continues_from_any_checkpoint_ends_with_the_same_bits(kept: int, tmp_path: Path) -> None:
    config = OptimConfig(
        epochs=3, plateau=True, plateau_patience=0, plateau_delta=5, early_stopping=True, log_every=2, clip=50
    )
    whole, checkpoints = ToyModel(), InMemory(every=3)
    lines = MetricsFile(tmp_path / "whole.jsonl")
    expected = fit(whole, ToyLoader(), ToyLoader(seed=1), config, checkpoints=checkpoints, metrics=lines)
    assert len(checkpoints.kept) >= 7  # the 21st step is the last: saved once at the end

    part = InMemory()
    part.kept = checkpoints.kept[: min(kept, len(checkpoints.kept) - 1) + 1]
    metrics = MetricsFile(tmp_path / "part.jsonl")
    metrics.path.write_text(lines.path.read_text())
    again = ToyModel(seed=9)
    result = fit(again, ToyLoader(), ToyLoader(seed=1), config, checkpoints=part, metrics=metrics)
    assert digest(again) == digest(whole)

    def losses(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k not in ("time", "cells_per_s", "wait")} for line in lines]

    assert losses(result.history) == losses(expected.history)
    shown = [{k: v for k, v in x.items() if "/" not in k} for x in losses(list(metrics.read()))]
    assert shown == [{k: v for k, v in x.items() if "/" not in k} for x in losses(list(lines.read()))]


def test_a_finished_run_does_nothing_and_more_epochs_continue_it() -> None:
    checkpoints = InMemory()
    model = ToyModel()
    fit(model, ToyLoader(), None, OptimConfig(epochs=2), checkpoints=checkpoints)
    before = digest(model)
    loader = ToyLoader()
    assert fit(model, loader, None, OptimConfig(epochs=2), checkpoints=checkpoints).stopped == "epochs"
    assert not loader.seen
    assert digest(model) == before
    assert fit(model, loader, None, OptimConfig(epochs=4), checkpoints=checkpoints).epochs == 4
    whole = ToyModel()
    fit(whole, ToyLoader(), None, OptimConfig(epochs=4))
    assert digest(model) == digest(whole)


def test_asked_to_stop_it_saves_and_says_so() -> None:
    checkpoints, asked = InMemory(), iter([False] * 9 + [True] * 99)
    model = ToyModel()
    result = fit(model, ToyLoader(), None, OptimConfig(epochs=3), checkpoints=checkpoints, stop=lambda: next(asked))
    assert (result.stopped, result.steps) == ("interrupted", 10)
    fit(model, ToyLoader(), None, OptimConfig(epochs=3), checkpoints=checkpoints)
    whole = ToyModel()
    fit(whole, ToyLoader(), None, OptimConfig(epochs=3))
    assert digest(model) == digest(whole)


def test_max_steps_ends_in_the_middle_of_an_epoch() -> None:
    result = fit(ToyModel(), ToyLoader(), None, OptimConfig(epochs=3, max_steps=9))
    assert (result.stopped, result.steps, result.epochs) == ("steps", 9, 1)


def test_early_stopping_ends_the_run() -> None:
    config = OptimConfig(epochs=50, early_stopping=True, stop_patience=2, stop_delta=1e9)
    result = fit(ToyModel(), ToyLoader(), ToyLoader(seed=1), config)
    assert (result.stopped, result.epochs) == ("early", 3)


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    model, loader, checkpoints = ToyModel(), ToyLoader(poison=17), InMemory()
    with pytest.raises(NonFiniteError, match=r"step \d+: .* rows "):
        fit(model, loader, None, OptimConfig(epochs=1), checkpoints=checkpoints)
    assert all(bool(v.isfinite().all()) for v in model.state_dict().values())
    assert not checkpoints.kept


def test_a_validation_that_is_not_finite_stops() -> None:
    with pytest.raises(NonFiniteError, match="validation/"):
        fit(ToyModel(), ToyLoader(), ToyLoader(seed=1, poison=3), OptimConfig(epochs=1))


def test_a_term_that_is_not_there_cannot_be_monitored() -> None:
    with pytest.raises(UsageError, match=r"--optim\.monitor nonsense.*reconstruction"):
        fit(ToyModel(), ToyLoader(), ToyLoader(), OptimConfig(epochs=1, plateau=True, monitor="nonsense"))


def test_a_monitor_is_checked_before_the_first_update_though_nothing_watches_it() -> None:
    model, loader = ToyModel(), ToyLoader()
    before = digest(model)
    with pytest.raises(UsageError, match=r"--optim\.monitor nonsense.*reconstruction"):
        fit(model, loader, None, OptimConfig(epochs=1, monitor="nonsense"))
    assert digest(model) == before
    fit(ToyModel(), ToyLoader(), ToyLoader(), OptimConfig(epochs=1, plateau=True, monitor="loss"))


def test_frozen_parameters_stay_and_only_those_that_train_are_optimised() -> None:
    model = ToyModel()
    model.requires_grad_(False)
    model.condition.weight.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, ToyLoader(), None, OptimConfig(epochs=1, weight_decay=0))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"condition.weight"}


def test_clipping_bounds_the_update() -> None:
    model, free = ToyModel(), ToyModel()
    fit(model, ToyLoader(), None, OptimConfig(epochs=1, clip=1e-3, lr=1e-3))
    fit(free, ToyLoader(), None, OptimConfig(epochs=1, lr=1e-3))
    start = ToyModel()

    def moved(model: ToyModel) -> float:
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    assert moved(model) < moved(free) / 10


def test_every_cell_is_seen_once_an_epoch_and_lines_are_written(tmp_path: Path) -> None:
    loader, metrics = ToyLoader(), MetricsFile(tmp_path / "metrics.jsonl")
    fit(ToyModel(), loader, ToyLoader(seed=1), OptimConfig(epochs=1, log_every=3), metrics=metrics)
    assert np.array_equal(np.sort(np.concatenate(loader.seen)), np.arange(200))
    lines = list(metrics.read())
    assert [line["of"] for line in lines] == ["steps", "steps", "epoch"]
    needed = {"time", "step", "epoch", "cells", "cells_per_s", "wait", "train/loss", "train/elbo"}
    assert all(needed <= set(line) for line in lines)
    assert "validation/elbo" in lines[-1]


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_batch_in_parts_moves_the_weights_as_the_whole(parts: int) -> None:
    whole, parted = ToyModel(), ToyModel()
    config = OptimConfig(epochs=2, lr=0.01, clip=30.0)
    wanted = fit(whole, ToyLoader(n_cells=203), None, config)
    found = fit(parted, ToyLoader(n_cells=203), None, config.model_copy(update={"accumulate": parts}))
    assert found.steps == wanted.steps
    for one, other in zip(parted.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for line, expected in zip(found.history, wanted.history, strict=True):
        assert line["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-6)


def test_only_one_part_is_computed_at_a_time_and_a_run_of_parts_resumes_with_the_same_bits() -> None:
    class Watched(ToyModel):
        sizes: ClassVar[list[int]] = []

        def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
            self.sizes.append(len(batch))
            return super().losses(batch, step, noise)

    config = OptimConfig(epochs=2, accumulate=4)
    whole, checkpoints = Watched(), InMemory(every=3)
    fit(whole, ToyLoader(n_cells=203), None, config, checkpoints=checkpoints)
    assert max(Watched.sizes) <= 8
    assert sum(Watched.sizes) == 2 * 203
    checkpoints.kept = checkpoints.kept[:2]
    again = Watched(seed=1)
    fit(again, ToyLoader(n_cells=203), None, config, checkpoints=checkpoints)
    assert digest(again) == digest(whole)


def test_more_parts_than_lanes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--optim.accumulate 9: .* has 8 here; set --data.lanes to 9"):
        fit(ToyModel(), ToyLoader(), None, OptimConfig(epochs=1, accumulate=9))
