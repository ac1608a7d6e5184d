"""Schedulers are told of trials as Ray Tune tells them, without Ray."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from scarcade.jobs.tune_board import DEFAULTS, Board
from scarcade.jobs.tune_config import TuneConfig
from scarcade.jobs.tune_domain import Choice, Range
from scarcade.jobs.tune_scheduler import Remembering, scheduler_of
from scarcade.jobs.tune_trial import Trial

CURVES = {f"trial-{i:04d}": [10.0 - i - epoch / (i + 1) for epoch in range(1, 9)] for i in (3, 0, 4, 1, 2, 5)}


class Told:
    """A trial as far as a scheduler looks at it."""

    def __init__(self, name: str) -> None:
        self.trial_id = name

    def __str__(self) -> str:
        return self.trial_id


def made(out: Path, scheduler: str) -> tuple[Board, Remembering]:
    board = Board(out, "min")
    board.load()
    config = TuneConfig.model_validate({"scheduler": scheduler, "reduction": 2})
    inner = scheduler_of(config, mode="min", epochs=8, space={}, seed=0)
    return board, Remembering(inner, board, feed=True)


def run(board: Board, scheduler: Remembering, name: str, until: int = 8) -> None:
    """Train the trial to the epoch `until`, or to where the scheduler stops it."""
    if name not in board:
        board.put(Trial(name, {}))
    trial, begun = Told(name), len(board[name].curve)
    scheduler.on_trial_add(None, trial)
    for epoch in range(begun + 1, until + 1):
        result = {"epoch": epoch, "objective": CURVES[name][epoch - 1], "metrics": {}, "parameters": {}}
        over = epoch == 8
        decision = TrialScheduler.STOP if over else scheduler.on_trial_result(None, trial, result)
        stopped = decision == TrialScheduler.STOP
        board.took(name, result, "done" if over else "stopped" if stopped else "running")
        if stopped:
            scheduler.on_trial_complete(None, trial, result)
            return


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_scheduler_that_is_told_the_past_decides_as_one_that_saw_it(tmp_path: Path, scheduler: str) -> None:
    board, told = made(tmp_path / "whole", scheduler)
    for name in CURVES:
        run(board, told, name)
    states = [trial.state for trial in board]
    assert {"done", "stopped"} <= set(states)

    names = list(CURVES)
    board, told = made(tmp_path / "parts", scheduler)
    for name in names[:3]:
        run(board, told, name)
    run(board, told, names[3], until=1)  # and is killed
    board, told = made(tmp_path / "parts", scheduler)
    for name in names[3:]:
        run(board, told, name)
    assert [trial.state for trial in board] == states
    assert [trial.epochs for trial in board] == [len(trial.curve) for trial in board]


def test_the_defaults_are_never_stopped(tmp_path: Path) -> None:
    board, told = made(tmp_path, "asha")
    for name in ("trial-0004", "trial-0005"):
        run(board, told, name)
    board.put(Trial(DEFAULTS, {}))
    bad = Told(DEFAULTS)
    told.on_trial_add(None, bad)
    assert told.on_trial_result(None, bad, {"epoch": 1, "objective": 99.0}) == TrialScheduler.CONTINUE
    told.on_trial_complete(None, bad, {"epoch": 8, "objective": 99.0})


def test_what_failed_or_was_interrupted_tells_a_scheduler_nothing(tmp_path: Path) -> None:
    board, told = made(tmp_path, "asha")
    board.put(Trial("trial-0000", {}))
    trial = Told("trial-0000")
    told.on_trial_add(None, trial)
    for result in ({"interrupted": True}, {"failed": "broken"}):
        assert told.on_trial_result(None, trial, result) == TrialScheduler.STOP
        told.on_trial_complete(None, trial, result)


def test_a_population_changes_what_the_optimiser_is_given_alone() -> None:
    space: dict[str, Any] = {"model.n_latent": Choice((5, 10)), "optim.lr": Range(1e-4, 1e-2, log=True)}
    pbt: Any = scheduler_of(TuneConfig(scheduler="pbt"), mode="min", epochs=8, space=space, seed=0)
    explore = pbt._custom_explore_fn
    config = {"shared": {}, "trial": json.dumps({"name": "x", "parameters": {"model.n_latent": 5, "optim.lr": 9e-3}})}
    found = [json.loads(explore(config)["trial"])["parameters"] for _ in range(20)]
    assert {one["model.n_latent"] for one in found} == {5}
    assert all(1e-4 <= one["optim.lr"] <= 1e-2 for one in found)
    assert np.unique([one["optim.lr"] for one in found]).size > 2
