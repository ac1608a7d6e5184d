"""kill -9 of a worker, of all workers, of the driver, at random steps: the weights of a run that was never killed."""

import random
import signal
from pathlib import Path

import psutil
import pytest

from tests.faults.training import EPOCHS, Training, make_store

KILLS = 10
STEPS = EPOCHS * 12  # 360 cells of 400 are trained on, in batches of 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("kill") / "atlas.zarr")


@pytest.fixture(scope="module")
def expected(store: Path) -> dict[int, str]:
    """The weights of runs that nobody killed, by the number of workers."""
    found = {}
    for workers in (0, 2):
        training = Training(store, store.parent / f"whole-{workers}", workers)
        training.start()
        training.wait()
        assert training.step() == STEPS
        found[workers] = training.weights()
    return found


def moments(seed: int) -> list[int]:
    """Steps at which to kill, ascending."""
    return sorted(random.Random(seed).sample(range(5, STEPS - 5), KILLS))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_driver_is_killed_at_ten_random_steps(store: Path, expected: dict[int, str], tmp_path: Path) -> None:
    training, kills = Training(store, tmp_path / "run"), 0
    for step in moments(1):
        training.start()
        if training.reach(step):
            training.kill()
            kills += 1
    training.start()
    training.wait()
    assert kills == KILLS
    assert training.weights() == expected[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victims", [1, 2])
def test_workers_are_killed_at_ten_random_steps(
    store: Path, expected: dict[int, str], tmp_path: Path, victims: int
) -> None:
    training, kills = Training(store, tmp_path / "run", workers=2), 0
    training.start()
    for step in moments(10 + victims):
        if training.reach(step):
            training.kill_workers(victims)
            kills += 1
    training.wait()
    assert kills == KILLS
    assert training.weights() == expected[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_driver_of_workers_is_killed_and_leaves_nothing_behind(
    store: Path, expected: dict[int, str], tmp_path: Path
) -> None:
    training, kills = Training(store, tmp_path / "run", workers=2), 0
    for step in moments(3):
        training.start()
        if training.reach(step):
            family = training.kill()
            kills += 1
            assert len(family) > 5
            _, alive = psutil.wait_procs(family, timeout=20)
            assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    training.start()
    training.wait()
    assert kills == KILLS
    assert training.weights() == expected[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_commits_and_can_be_continued(
    store: Path, expected: dict[int, str], tmp_path: Path, workers: int, number: int
) -> None:
    training = Training(store, tmp_path / "run", workers)
    training.start()
    assert training.reach(50)
    code = training.send(number)
    # Python ends on SIGINT by its own signal or with 1, and has no handler for SIGTERM
    assert code in (-number, 130, 1)
    newest = max((training.out / "checkpoints").iterdir())
    assert int(newest.name.removeprefix("step-")) >= training.step() - 1  # committed where it stood
    training.start()
    training.wait()
    assert training.weights() == expected[workers]
