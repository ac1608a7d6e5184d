import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.cluster import Room, cluster
from scarcade.engine.errors import ClusterError, InputError
from scarcade.jobs.tune import Search, tune

LAYER_NORM = {"n_hidden": 8, "use_batch_norm": "none", "use_layer_norm": "both"}  # of which workers need not agree
GRID: dict[str, Any] = {"model.n_latent": {"grid": [2, 4]}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return simulate(tmp_path_factory.mktemp("gang") / "a.zarr", cells=500, genes=40, batches=2, labels=3, seed=2)


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    """With room for one trial of two workers."""
    with cluster(cpus=2):
        yield


def searched(
    store: Store,
    out: Path,
    *,
    workers: int,
    epochs: int = 3,
    watch: Callable[[Mapping[str, Any]], None] = lambda message: None,
    space: Mapping[str, Any] = GRID,
    **more: Any,
) -> Search:
    settings: dict[str, Any] = {
        "model": LAYER_NORM,
        "data": {"batch_size": 64},
        "tune": {"search": "grid", "scheduler": "fifo", "concurrent": 1, **more.pop("tune", {})},
        "checkpoint": {"every_steps": 5},
    }
    return tune(
        store,
        out=out,
        space=space,
        workers=workers,
        epochs=epochs,
        threads=1,
        seed=1,
        settings=settings,
        progress=watch,
        **more,
    )


def members() -> set[int]:
    """The processes of workers that are not the first of their trial."""
    below = psutil.Process().children(recursive=True)
    return {one.pid for one in below if one.is_running() and "ray::Member" in " ".join(_command(one))}


def until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not so after {seconds:.0f} s"
        time.sleep(0.1)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


@pytest.mark.long
def test_trials_of_two_workers_are_those_of_one_and_wait_for_each_other(store: Store, tmp_path: Path) -> None:
    # two trials at a time are asked for, and there is room for one: with half of each they would wait for ever
    found = searched(store, tmp_path / "two", workers=2, tune={"concurrent": 2})
    one = searched(store, tmp_path / "one", workers=1)
    for trial, other in zip(found.trials, one.trials, strict=True):
        assert trial.state == other.state == "done"
        assert trial.epochs == 3
        assert [value for _, value in trial.curve] == pytest.approx([value for _, value in other.curve], rel=1e-4)
    assert not list((tmp_path / "two").glob("trials/*/checkpoints"))


def _epochs(trial: Path) -> list[dict[str, Any]]:
    """The lines of metrics of its epochs."""
    lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["of"] == "epoch"]


@pytest.mark.slow
def test_a_trial_whose_member_is_killed_continues_from_its_checkpoint(store: Store, tmp_path: Path) -> None:
    space, epochs = {"optim.lr": {"grid": [1e-3]}}, 60
    killed: dict[int, float] = {}
    said: list[str] = []

    def watch(message: Mapping[str, Any]) -> None:
        said.append(str(message.get("warning", "")))
        for trial in message.get("trials", []):
            if trial.epochs >= 2 and not killed:
                assert trial.epochs < epochs, "over before anything could be killed"
                (member,) = members()
                os.kill(member, signal.SIGKILL)
                killed[member] = time.time()

    found = searched(store, tmp_path / "killed", workers=2, epochs=epochs, space=space, watch=watch)
    assert killed
    assert found.best.state == "done"
    assert "trial-0000: its process died; it goes on from its last checkpoint" in said
    lines = _epochs(tmp_path / "killed" / "trials" / "trial-0000")
    assert len(lines) == epochs
    assert lines[0]["time"] < min(killed.values()) < lines[-1]["time"]  # the first epochs were not trained again
    whole = searched(store, tmp_path / "whole", workers=2, epochs=epochs, space=space)
    assert found.best.curve == whole.best.curve


@pytest.mark.long
def test_a_worker_that_dies_between_two_trials_is_replaced(store: Store, tmp_path: Path) -> None:
    gone: set[int] = set()

    def watch(message: Mapping[str, Any]) -> None:
        for trial in message.get("trials", []):
            if trial.state == "done" and not gone:
                gone.update(members())
                for member in gone:
                    os.kill(member, signal.SIGKILL)

    space = {"optim.lr": {"grid": [1e-3, 2e-3]}}
    found = searched(store, tmp_path / "s", workers=2, space=space, watch=watch, epochs=20)
    assert gone
    assert [trial.state for trial in found.trials] == ["done", "done"]
    assert [trial.epochs for trial in found.trials] == [20, 20]


@pytest.mark.long
def test_what_a_worker_cannot_read_is_told_as_it_is(tmp_path: Path) -> None:
    damaged = simulate(tmp_path / "a.zarr", cells=12_000, genes=300, batches=2, labels=3, seed=2)
    path = damaged.path / "X" / "data" / "c" / "0"
    content = bytearray(path.read_bytes())
    content[len(content) * 9 // 10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"all 1 trials failed; 1 of them: .*its checksum .* is wrong"):
        searched(damaged, tmp_path / "s", workers=2, space={"optim.lr": {"grid": [1e-3]}})


@pytest.mark.long
def test_a_trial_that_fails_fails_alone_and_its_workers_train_the_next(store: Store, tmp_path: Path) -> None:
    until(lambda: not members())  # the search before this one is over; its processes may still be on their way out
    seen: set[int] = set()
    space = {"optim.lr": {"grid": [1e-3, 1e30, 2e-3]}}
    found = searched(store, tmp_path / "s", workers=2, space=space, watch=lambda message: seen.update(members()))
    assert [trial.state for trial in found.trials] == ["done", "failed", "done"]
    assert "not finite" in str(found.trials[1].reason)
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "pbt"])
def test_schedulers_that_stop_and_pause_have_gangs_too(store: Store, tmp_path: Path, scheduler: str) -> None:
    tuned = {"search": "random", "scheduler": scheduler, "perturb": 1, "reduction": 2}
    space = {"optim.lr": {"loguniform": [1e-4, 2e-2]}}
    options: dict[str, Any] = {"epochs": 4, "trials": 4, "space": space, "tune": tuned, "objective": "batch_score"}
    found = searched(store, tmp_path / "s", workers=2, refit=True, **options)
    assert all(trial.state in ("done", "stopped") for trial in found.trials)
    assert found.model is not None
    assert found.model.is_dir()
    assert searched(store, tmp_path / "s", workers=0, **options).trials == found.trials


def test_a_group_has_room_where_all_of_it_has() -> None:
    Room({"CPU": 1.0}, 0.1, group=2).wait()
    Room({"CPU": 0.5}, 0.1, group=4).wait()
    with pytest.raises(ClusterError, match="cannot give 3 workers 1 CPU each"):
        Room({"CPU": 1.0}, 0.1, group=3).wait()
