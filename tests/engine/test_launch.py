"""Ray Train, for real: one private session for all tests here, as starting one takes seconds."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from scarcade.engine.cluster import _init, cluster
from scarcade.engine.config import checked
from scarcade.engine.errors import ClusterError, NonFiniteError, UsageError
from scarcade.engine.interrupts import Interrupts
from scarcade.engine.launch import Scale, Work, Worker, run


def launched(work: Work, place: Path, told: list[Mapping[str, Any]] | None = None, **scale: Any) -> dict[str, Any]:
    """`work` on the workers that `scale` asks for."""
    tell = (told if told is not None else []).append
    return run(work, {"n": 3, "out": str(place)}, Scale(**scale), str(place), tell=tell, interrupts=Interrupts())


def look(worker: Worker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker finds around it."""
    worker.tell({"hello": worker.world.rank, "n": arguments["n"]})
    values = torch.ones(1) * (worker.world.rank + 1)
    if worker.announce is not None:
        folder = Path(arguments["out"]) / "checkpoints" / "step-00000007"
        if worker.world.first:
            folder.mkdir(parents=True)
        worker.announce(folder if worker.world.first else None, 7)
    return {
        "size": worker.world.size,
        "sum": worker.world.sum(values).item(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "stop": worker.stop(),
    }


def fail_on_the_last(worker: Worker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """One worker meets an error of ours while the other waits for it in a collective."""
    with open(Path(arguments["out"]).with_suffix(".attempts"), "a") as file:
        file.write("x")
    if worker.world.rank == worker.world.size - 1:
        raise NonFiniteError("step 3: not finite")
    worker.world.sum(torch.zeros(1))
    return {}


def crash(worker: Worker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A bug: not an error of ours."""
    with open(Path(arguments["out"]).with_suffix(".attempts"), "a") as file:
        file.write("x")
    raise ZeroDivisionError("a bug in a worker")


def wait_to_be_stopped(worker: Worker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    worker.tell({"waiting": True})
    deadline = time.monotonic() + 60
    while not worker.stop() and time.monotonic() < deadline:
        time.sleep(0.05)
    return {"stopped": worker.stop()}


def test_without_workers_it_is_a_plain_call_and_ray_is_not_imported(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    found = launched(look, tmp_path, threads=1)
    assert found == {"size": 1, "sum": 1.0, "threads": 1, "pid": os.getpid(), "stop": False}
    assert torch.get_num_threads() == before
    code = "import sys, scarcade.engine.launch, scarcade.engine.loop; print('ray' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="min_workers"):
        checked(Scale, {"workers": 2, "min_workers": 3})


def test_a_cluster_that_is_not_there_is_a_cluster_error(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"--scale\.address 127\.0\.0\.1:1"):
        launched(look, tmp_path, workers=1, address="127.0.0.1:1")


@pytest.fixture(scope="module")
def session() -> Iterator[Path]:
    """A private session that the tests share; its folder."""
    import ray  # noqa: F401 - which sets a variable by being imported

    before = dict(os.environ)
    with cluster(cpus=2):
        folder = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
        yield folder
        family = psutil.Process().children(recursive=True)
    assert not folder.exists()
    assert not [p for p in psutil.wait_procs(family, timeout=5)[1] if p.name().startswith("ray")]
    assert {k: v for k, v in os.environ.items() if k.startswith("RAY_")} == {
        k: v for k, v in before.items() if k.startswith("RAY_")
    }


def test_a_private_session_keeps_its_token_to_itself(session: Path) -> None:
    assert stat.S_IMODE(session.stat().st_mode) == 0o700
    assert stat.S_IMODE((session / "token").stat().st_mode) == 0o600


def _family() -> list[list[str]]:
    """The command lines of our processes, but for those that have ended and were not waited for."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found.append(child.cmdline())
    return found


def test_a_private_session_has_the_processes_that_it_uses(session: Path) -> None:
    running = " ".join(word for words in _family() for word in words)
    assert "gcs_server" in running
    assert not [name for name in ("monitor.py", "dashboard.py", "log_monitor.py") if name in running]


@pytest.mark.long
def test_workers_form_a_world_and_speak_to_the_driver(session: Path, tmp_path: Path) -> None:
    told: list[Mapping[str, Any]] = []
    found = launched(look, tmp_path / "run", told, workers=2, threads=1)
    assert (found["size"], found["sum"], found["threads"]) == (2, 3.0, 1)
    assert found["pid"] != os.getpid()
    assert {"hello": 0, "n": 3} in told
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoints"]  # Ray's own files are gone


def test_an_error_of_ours_on_one_worker_comes_out_as_itself_and_is_not_retried(session: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 3: not finite"):
        launched(fail_on_the_last, tmp_path / "run", workers=2, threads=1)
    assert (tmp_path / "run.attempts").read_text() == "xx"


@pytest.mark.long
def test_a_crash_is_retried_and_then_told_in_one_line(session: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"max-failures 1 allows \(.*a bug in a worker"):
        launched(crash, tmp_path / "run", workers=1, threads=1, max_failures=1)
    assert (tmp_path / "run.attempts").read_text() == "xx"


def test_workers_that_the_cluster_cannot_give_are_an_error(session: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"did not give 3 workers of 1 cores each within 3 s"):
        launched(look, tmp_path / "run", workers=3, cpus_per_worker=1, start_seconds=3)


def test_the_wish_to_stop_reaches_the_workers(session: Path, tmp_path: Path) -> None:
    interrupts = Interrupts()
    actors: set[str] = set()

    def tell(message: Mapping[str, Any]) -> None:
        actors.update(word for words in _family() for word in words[:1] if word.startswith("ray::"))
        interrupts.signal = 2

    scale = Scale(workers=1, threads=1)
    place = tmp_path / "run"
    assert run(wait_to_be_stopped, {}, scale, str(place), tell=tell, interrupts=interrupts) == {"stopped": True}
    assert [name for name in actors if "TrainWorker" in name]
    assert not [name for name in actors if "Controller" in name or "Coordinator" in name or "Dataset" in name]


def test_a_node_that_is_too_slow_to_start_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ClusterError, match=r"could not be started \(The current node timed out during startup\.\)"):
        _init(address="local")
    with pytest.raises(ClusterError, match=r"--scale\.address 1\.2\.3\.4:5: the Ray cluster could not be reached"):
        _init(address="1.2.3.4:5")
