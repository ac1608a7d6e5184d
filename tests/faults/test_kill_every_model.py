"""kill -9 in the middle of an epoch, for every model: continued, it ends with the weights of a run that nobody killed.

What a model knows beyond its weights is what a kill would lose: moments of its optimiser, weights of the KL and of
lassos that warm up, learning rates on a plateau, where its labelled stream stands, buffers that are found once.
"""

import multiprocessing as mp
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scarcade.dataloaders.store import Store
from scarcade.jobs.train import train
from scarcade.models import MODELS
from tests.every_model import EVERY, made_store, settings_of
from tests.faults.training import Training
from tests.jobs.test_update import new_cells, new_store

EPOCHS, STEPS = 5, 25  # 270 cells of 300 are trained on, in 5 steps an epoch


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(tmp_path_factory.mktemp("kill") / "a.zarr")


def settings(name: str, store: Store) -> dict[str, Any]:
    """Schedules that are under way all the time, and checkpoints that are not where the kill is."""
    # no change is an improvement: the learning rate falls after every epoch but the first
    plateau = {"plateau": True, "plateau_patience": 0, "plateau_delta": 1e9}
    raw = settings_of(name, store.schema, epochs=EPOCHS, kl_epochs=4, lr=0.01, **plateau)
    raw["checkpoint"] = {"every_steps": 4, "every_seconds": None}
    if MODELS[name].labelled_beside:
        raw["data"]["samples_per_label"] = 15
    return raw


def die_at(step: int, store: str, name: str, out: str, raw: Mapping[str, Any]) -> None:
    """Train until `step`, and be killed there."""

    def look(line: Mapping[str, Any]) -> None:
        if line.get("step", 0) >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(store, name, out=out, settings=raw, progress=look)


def killed(step: int, store: Store, name: str, out: Path) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=die_at, args=(step, str(store.path), name, str(out), settings(name, store)))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "model").exists()


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_killed_twice_and_continued_it_has_the_same_bits(name: str, store: Store, tmp_path: Path) -> None:
    train(store, name, out=tmp_path / "whole", settings=settings(name, store), progress=lambda _: None)
    for step in (3, 13):  # before there is a checkpoint; in the third epoch, one step after a checkpoint
        killed(step, store, name, tmp_path / "run")
    run = train(store, name, out=tmp_path / "run", settings=settings(name, store), progress=lambda _: None)
    assert [line["epoch"] for line in run.history] == list(range(EPOCHS))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", EVERY)
def test_workers_and_driver_are_killed(name: str, store: Store, tmp_path: Path) -> None:
    def training(out: Path) -> Training:
        raw = settings(name, store)
        raw["optim"]["epochs"] = 40
        raw["scale"] |= {"workers": 2, "max_failures": -1}
        return Training(store.path, out, model=name, settings=raw)

    whole = training(tmp_path / "whole")
    whole.start()
    whole.wait()
    hurt = training(tmp_path / "run")
    hurt.start()
    assert hurt.reach(31)
    hurt.kill_workers(1)
    assert hurt.reach(67)
    hurt.kill_workers(2)
    assert hurt.reach(103)
    hurt.kill()
    hurt.start()
    hurt.wait()
    assert hurt.weights() == whole.weights()


def die_in_an_update(store: str, reference: str, out: str, raw: Mapping[str, Any]) -> None:
    """Update until step 13, and be killed there."""

    def look(line: Mapping[str, Any]) -> None:
        if line.get("step", 0) >= 13:
            os.kill(os.getpid(), signal.SIGKILL)

    train(store, out=out, update=reference, settings=raw, progress=look)


def test_an_update_is_killed_and_continued_to_the_same_bits(store: Store, tmp_path: Path) -> None:
    """The rows that surgery adds are made anew, and take what the checkpoint holds of them."""
    raw = settings("totalvi", store)
    train(store, "totalvi", out=tmp_path / "first", settings=raw, recipe="scarches", progress=lambda _: None)
    reference = tmp_path / "first" / "model"
    data = new_store(new_cells(store, "new", 300), tmp_path / "new.zarr")
    raw.pop("model")
    process = mp.get_context("forkserver").Process(
        target=die_in_an_update, args=(str(data.path), str(reference), str(tmp_path / "run"), raw)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    for out in ("run", "whole"):
        train(data, out=tmp_path / out, update=reference, settings=raw, progress=lambda _: None)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
