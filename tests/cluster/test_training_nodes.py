"""Training on several raylets of one host: nodes are killed and join, and every cell is met once in each epoch.

All with the times that Ray has by default: nothing here needs a setting of the cluster's.
"""

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.cores import cores
from scarcade.engine.metrics import MetricsFile
from tests.cluster.nodes import Nodes, cluster_of
from tests.cluster.recorded import EPOCHS, Recording, expected_rows

CELLS = 800


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nodes") / "atlas.zarr"
    simulate(path, cells=CELLS, genes=40, batches=2, labels=3, seed=3)
    return path


@pytest.fixture
def begun(request: pytest.FixtureRequest) -> Iterator[list[Recording]]:
    """Trainings that are ended after the test, whatever became of it."""
    recordings: list[Recording] = []
    yield recordings
    for one in recordings:
        one.kill()


def is_whole(training: Recording, store: Path) -> None:
    """The run met every batch as if nothing had happened, and its metrics tell of every step once."""
    expected = expected_rows(store)
    assert training.rows() == expected
    lines = list(MetricsFile(training.out / "metrics.jsonl").read())
    assert [line["step"] for line in lines] == list(range(1, len(expected) + 1))
    assert lines[-1]["cells"] == EPOCHS * CELLS
    assert all(math.isfinite(line["train/loss"]) for line in lines)


def lose(nodes: Nodes, training: Recording, number: int, groups: int) -> float:
    """Kill a node; the seconds until the first step of the group after it."""
    began = time.time()
    nodes.kill(number)
    return training.reach(groups, 1) - began


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_lost_node_is_gone_on_without(store: Path, tmp_path: Path, short: Path, begun: list[Recording]) -> None:
    with cluster_of(short / "ray", 1, 1) as nodes:
        training = Recording(nodes, store, tmp_path / "run", workers=2, min_workers=1)
        begun.append(training)
        training.reach(1, 8)
        lose(nodes, training, 1, 2)
        result = training.result()
    assert training.groups() == [2, 1]
    assert result["steps"] == 25 * EPOCHS
    is_whole(training, store)
    (said,) = training.sentences()
    assert "is lost: going on with 1 of 2 workers from step " in said


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", [True, False], ids=["rank 0 goes", "rank 0 stays"])
def test_a_node_of_two_is_lost_and_another_gained(
    store: Path, tmp_path: Path, short: Path, begun: list[Recording], first: bool
) -> None:
    with cluster_of(short / "ray", 0, 2, 2) as nodes:
        training = Recording(nodes, store, tmp_path / "run", workers=4, min_workers=2, pace=0.5)
        begun.append(training)
        training.reach(1, 8)
        home = 1 if nodes.holds(1, training.first_rank()) else 2
        seconds = lose(nodes, training, home if first else 3 - home, 2)
        print(f"first step {seconds:.1f} s after the loss")
        training.reach(2, 7)
        began = time.time()
        nodes.add(2)
        print(f"first step with four workers {training.reach(3, 1) - began:.1f} s after a node was added")
        training.result()
    assert training.groups() == [4, 2, 4]
    is_whole(training, store)
    lost, gained = training.sentences()
    assert "is lost: going on with 2 of 4 workers from step " in lost
    assert gained.startswith("4 workers again, from step ")
    assert seconds < 60 * max(1.0, os.getloadavg()[0] / (cores() + 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_fewer_workers_allowed_a_lost_node_is_waited_for_and_then_told(
    store: Path, tmp_path: Path, short: Path, begun: list[Recording]
) -> None:
    with cluster_of(short / "ray", 0, 1, 1) as nodes:
        training = Recording(nodes, store, tmp_path / "run", workers=2, start_seconds=12)
        begun.append(training)
        training.reach(1, 8)
        nodes.kill(2)
        assert training.process.wait(120) != 0
    error = training.errors.read_text()
    assert "waiting for room for 2 workers" in training.sentences()[0]
    assert "is lost, and the cluster did not give 2 workers of 1 cores each again within 12 s" in error
    assert "set --scale.min-workers to go on with fewer" in error


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_comes_back_in_time_is_waited_for(
    store: Path, tmp_path: Path, short: Path, begun: list[Recording]
) -> None:
    with cluster_of(short / "ray", 0, 1, 1) as nodes:
        training = Recording(nodes, store, tmp_path / "run", workers=2)
        begun.append(training)
        training.reach(1, 8)
        nodes.kill(2)
        nodes.add(1)
        training.result()
    assert training.groups() == [2, 2]
    is_whole(training, store)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_cluster_is_lost(store: Path, tmp_path: Path, short: Path, begun: list[Recording]) -> None:
    with cluster_of(short / "ray", 1, 1) as nodes:
        training = Recording(nodes, store, tmp_path / "run", workers=2, min_workers=1)
        begun.append(training)
        training.reach(1, 8)
        nodes.kill_all()
        began = time.monotonic()
        assert training.process.wait(120) != 0
        print(f"told after {time.monotonic() - began:.1f} s")
    assert "is gone" in training.errors.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_is_to_leave_is_left_before_it_goes(
    store: Path, tmp_path: Path, short: Path, begun: list[Recording]
) -> None:
    with cluster_of(short / "ray", 0, 1, 1) as nodes:
        training = Recording(nodes, store, tmp_path / "run", workers=2, min_workers=1)
        begun.append(training)
        training.reach(1, 8)
        nodes.drain(2)
        training.reach(2, 1)
        nodes.kill(2)
        training.result()
    assert training.groups() == [2, 1]
    is_whole(training, store)
    met = [line["step"] for line in training.told() if "step" in line]
    assert met == list(range(1, len(met) + 1))  # no step was made twice
    assert "is to leave: going on with 1 of 2 workers from step " in training.sentences()[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="needs a kernel that lets this user have mounts of their own",
)
def test_a_folder_that_one_node_does_not_see_is_told_at_once(
    store: Path, tmp_path: Path, short: Path, begun: list[Recording]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with cluster_of(short / "ray", 1) as nodes:
        nodes.add(1, blind_to=home)
        training = Recording(nodes, store, home / "run", workers=2)
        begun.append(training)
        assert training.process.wait(150) != 0
    assert re.search(r"--out .*/run: the node [0-9.]+ does not see this folder", training.errors.read_text())
    assert not list((home / "run").iterdir())
