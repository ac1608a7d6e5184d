import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scarcade.engine.curves import About, Curves, LogConfig, Sink, check_installed, numbers
from scarcade.engine.curves_tensorboard import TensorBoard
from scarcade.engine.errors import OpenError, UsageError
from scarcade.engine.joined_run import JoinedRun
from scarcade.engine.metrics import Line, MetricsFile
from tests.event_files import curves


class Kept:
    """Keeps what it is given; may wait, or fail, at a step."""

    def __init__(self, after: int = -1, fails_at: int | None = None, waits: threading.Event | None = None) -> None:
        self.after, self.steps, self.ended = after, list[int](), ""
        self._fails_at, self._waits = fails_at, waits

    def write(self, line: Line) -> None:
        if self._waits is not None:
            self._waits.wait()
        if line["step"] == self._fails_at:
            raise OSError(28, "No space left on device")
        self.steps.append(line["step"])

    def flush(self) -> None: ...

    def close(self, ended: str) -> None:
        self.ended = ended


def line(step: int, of: str = "steps", **more: Any) -> Line:
    return {
        "time": 1e9 + step,
        "step": step,
        "epoch": 0,
        "cells": 10 * step,
        "of": of,
        "train/elbo": 1.0 * step,
        **more,
    }


def followed(folder: Path, opened: Callable[[], Sink], steps: range, **more: Any) -> tuple[Curves, list[str]]:
    """Curves of a run that takes these steps, and what was warned of."""
    warned: list[str] = []
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.rewind(steps.start - 1)
    found = Curves("Kept", metrics, opened, warned.append, **more)
    for step in steps:
        metrics.write(line(step))
        found.moved()
    return found, warned


def test_every_line_comes_once_also_from_a_start_before(tmp_path: Path) -> None:
    sink = Kept()
    first, warned = followed(tmp_path, lambda: sink, range(1, 6))
    first.close("interrupted")
    assert (sink.steps, sink.ended, warned) == ([1, 2, 3, 4, 5], "interrupted", [])
    again = Kept(after=5)  # continues from the checkpoint of step 3
    second, _ = followed(tmp_path, lambda: again, range(4, 8))
    second.close("finished")
    assert again.steps == [6, 7]
    new = Kept()
    third, _ = followed(tmp_path, lambda: new, range(8, 9))  # a target that is added later has all of them
    third.close("finished")
    assert new.steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_target_that_fails_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    sink = Kept(fails_at=3)
    found, warned = followed(tmp_path, lambda: sink, range(1, 6))
    found.close("finished")
    assert len(warned) == 1
    assert "No space left on device" in warned[0]
    assert "the same command sends what is missing" in warned[0]
    assert sink.steps == [1, 2]

    def gone() -> Sink:
        raise ConnectionError("nobody\nlistens")

    found, warned = followed(tmp_path, gone, range(6, 9))
    found.close("finished")
    assert [text.count("nobody listens") for text in warned] == [1]


def test_a_target_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    answer = threading.Event()
    sink = Kept(waits=answer)
    found, warned = followed(tmp_path, lambda: sink, range(1, 4), patience_s=0.1)
    found.close("finished")
    assert "did not take the last lines" in warned[0]
    answer.set()


def test_parts_of_an_epoch_are_curves_of_their_own() -> None:
    assert numbers(line(3, lr=0.1)) == {"cells": 30.0, "lr": 0.1, "within_epoch/train/elbo": 3.0}
    assert numbers(line(3, of="epoch", wait=None)) == {"cells": 30.0, "train/elbo": 3.0}


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path: Path) -> None:
    about = About("run", tmp_path, {"optim.lr": 1e-3})
    followed(tmp_path, lambda: TensorBoard(about), range(1, 6))[0].close("interrupted")
    (old,) = (tmp_path / "tensorboard").iterdir()
    old.write_bytes(old.read_bytes()[:-7])  # cut by a kill
    followed(tmp_path, lambda: TensorBoard(about), range(4, 8))[0].close("finished")
    assert curves(tmp_path / "tensorboard")["within_epoch/train/elbo"] == [(step, float(step)) for step in range(1, 8)]


def test_a_library_that_is_missing_is_named_with_what_to_install() -> None:
    check_installed(LogConfig(to=("tensorboard",)))
    if importlib.util.find_spec("mlflow") is None:
        with pytest.raises(UsageError, match=r'pip install "scarcade\[mlflow\]"'):
            check_installed(LogConfig(to=("tensorboard", "mlflow")))


@pytest.mark.filterwarnings("default")  # of the libraries below it
def test_mlflow_is_joined_again(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy")
    from scarcade.engine.curves_mlflow import Mlflow

    about, config = About("run", tmp_path, {"optim.lr": 1e-3}), LogConfig(to=("mlflow",), project="atlases")
    for steps in (range(1, 6), range(4, 8)):
        joined = JoinedRun(tmp_path, "mlflow")
        found, warned = followed(tmp_path, lambda joined=joined: Mlflow(config, about, joined), steps)  # type: ignore[misc]
        found.close("finished")
        assert warned == []
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("atlases").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params) == ("run", "FINISHED", {"optim.lr": "0.001"})
    assert [one.step for one in client.get_metric_history(run.info.run_id, "cells")] == list(range(1, 8))


@pytest.mark.filterwarnings("default")  # of the libraries below it
def test_wandb_writes_files_and_keeps_its_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from scarcade.engine.curves_wandb import Wandb

    about, config = About("run", tmp_path, {"optim.lr": 1e-3}), LogConfig(to=("wandb",))
    for steps in (range(1, 6), range(4, 8)):
        joined = JoinedRun(tmp_path, "wandb")
        found, warned = followed(tmp_path, lambda joined=joined: Wandb(config, about, joined), steps)  # type: ignore[misc]
        found.close("finished")
        assert warned == []
    joined = JoinedRun(tmp_path, "wandb")
    assert joined.step == 7
    assert {path.name.rsplit("-", 1)[1] for path in (tmp_path / "wandb").glob("offline-run-*")} == {joined.ident}


def test_a_record_that_is_no_record_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text("[1")
    with pytest.raises(OpenError, match="without it a new run is begun"):
        JoinedRun(tmp_path, "wandb")
