"""A search that is killed, in its trials and as a whole, ends as one that never was."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.training import ROOT, make_store

EPOCHS, TRIALS = 12, 3
CONFIG = f"""
trials = {TRIALS}
epochs = {EPOCHS}
workers = WORKERS
threads = 1
batch-size = 32

[model]
name = "scvi"
n_hidden = 8

[space]
model.n_latent = {{choice = [2, 3, 4]}}
"optim.lr" = {{loguniform = [1e-4, 1e-2]}}

[tune]
scheduler = "fifo"
concurrent = 1

[checkpoint]
every_steps = 5
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Searching:
    """``scarcade tune`` in a process of its own."""

    def __init__(self, store: Path, out: Path, workers: int) -> None:
        self.out = out
        config = out.with_suffix(".toml")
        config.write_text(CONFIG.replace("WORKERS", str(workers)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "scarcade.jobs.cli", "tune", "--data", str(store), "--out", str(out)]
        self.errors = out.with_suffix(".stderr")
        with open(self.errors, "ab") as errors:
            self.process = subprocess.Popen(
                [*command, "--config", str(config)], cwd=ROOT, env=environment, stderr=errors, stdout=subprocess.DEVNULL
            )

    def record(self, number: int) -> dict[str, Any]:
        """The record of a trial as it is on the disk; empty before there is one."""
        path = self.out / "trials" / f"trial-{number:04d}" / "trial.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for `holds`, while the process lives."""
        deadline = time.monotonic() + 300
        while not holds():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.05)

    def trained(self, number: int, epochs: int) -> bool:
        return int(self.record(number).get("epochs", 0)) >= epochs

    def workers(self) -> list[psutil.Process]:
        """The processes that train trials."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in below if "SearchTrial" in " ".join(one.cmdline())]

    def end(self, number: int, *, wait: bool = True) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(120) if wait else 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("tune-kill") / "store.zarr")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_search_killed_in_its_parts_and_as_a_whole_ends_as_one_that_never_was(
    store: Path, tmp_path: Path, workers: int
) -> None:
    search = Searching(store, tmp_path / "killed", workers)
    search.until(lambda: search.trained(0, 2))
    for worker in search.workers():
        worker.kill()
    search.until(lambda: search.trained(1, 2))
    assert "trial-0000: its process died" in search.errors.read_text()
    search.end(signal.SIGKILL)
    assert search.record(0)["state"] == "done"
    assert search.record(1)["state"] == "running"
    first = (search.out / "trials" / "trial-0000" / "metrics.jsonl").read_bytes()

    search = Searching(store, search.out, workers)
    search.until(lambda: search.trained(2, 2))
    assert search.end(signal.SIGINT) == 130
    assert search.record(2)["state"] == "waiting"
    assert list((search.out / "trials" / "trial-0002" / "checkpoints").iterdir())
    reached = search.record(2)["epochs"]

    search = Searching(store, search.out, workers)
    assert search.process.wait(300) == 0, search.errors.read_text()
    assert (search.out / "trials" / "trial-0000" / "metrics.jsonl").read_bytes() == first
    lines = (search.out / "trials" / "trial-0002" / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if json.loads(line)["of"] == "epoch"]) == EPOCHS

    whole = Searching(store, tmp_path / "whole", workers)
    assert whole.process.wait(300) == 0, whole.errors.read_text()
    for number in range(TRIALS):
        killed, other = search.record(number), whole.record(number)
        assert killed["curve"] == other["curve"]
        assert killed["epochs"] == EPOCHS >= reached
    assert (search.out / "best.toml").read_bytes() == (whole.out / "best.toml").read_bytes()
