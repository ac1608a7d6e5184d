"""A small training in a process of its own, to be killed. Run as a program: one JSON object of arguments."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from scarcade.engine.metrics import MetricsFile

ROOT = Path(__file__).parents[2]
EPOCHS = 40
MODEL = {"n_hidden": 8, "n_latent": 3, "use_batch_norm": "encoder"}


def make_store(path: Path) -> Path:
    from scarcade.dataloaders.synthetic import simulate

    simulate(path, cells=400, genes=40, batches=2, labels=3, seed=3)
    return path


def scvi_settings(**more: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "optim": {"epochs": EPOCHS, "kl_epochs": 20, "log_every": 1, "plateau": True, "plateau_patience": 1},
        "checkpoint": {"every_steps": 9, "every_seconds": None},
        "data": {"batch_size": 32},
        "scale": {"threads": 1, **more},
    }


class Training:
    """The process, its run folder, and ways to hurt it."""

    def __init__(
        self,
        store: Path,
        out: Path,
        workers: int = 0,
        *,
        model: str = "scvi",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.out = out
        chosen = settings or scvi_settings(workers=workers, max_failures=-1)
        arguments = {"data": str(store), "model": model, "out": str(out), "settings": chosen}
        self._command = [sys.executable, "-m", "tests.faults.training", json.dumps(arguments)]
        self.process: subprocess.Popen[bytes] | None = None
        self.errors = out.with_suffix(".stderr")

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self.errors, "ab") as errors:
            self.process = subprocess.Popen(self._command, cwd=ROOT, env=environment, stderr=errors)

    def step(self) -> int:
        """The last step that the metrics tell of."""
        last = 0
        for line in MetricsFile(self.out / "metrics.jsonl").read():
            last = line["step"]
        return last

    def reach(self, step: int, timeout: float = 240) -> bool:
        """Wait until `step`; False if the process ended before."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while self.step() < step:
            assert time.monotonic() < deadline, f"step {step} was not reached: {self.errors.read_text()[-2000:]}"
            if self.process.poll() is not None:
                return False
            time.sleep(0.003)
        return True

    def family(self) -> list[psutil.Process]:
        """All processes below this one."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_workers(self, how_many: int) -> None:
        """kill -9 for as many of the training workers."""
        workers = [p for p in self.family() if p.name().startswith("ray::RayTrain")]
        assert workers
        for worker in random.sample(workers, min(how_many, len(workers))):
            worker.kill()

    def kill(self) -> list[psutil.Process]:
        """kill -9 for the driver; returns what it had started."""
        family = self.family()
        self.send(signal.SIGKILL)
        return family

    def send(self, number: int, timeout: float = 60) -> int:
        """Send a signal and wait for the end; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def wait(self, timeout: float = 280) -> None:
        """Wait for a good end."""
        assert self.process is not None
        assert self.process.wait(timeout) == 0, self.errors.read_text()[-3000:]

    def weights(self) -> str:
        """sha256 of the weights it ended with."""
        return hashlib.sha256((self.out / "model" / "model.safetensors").read_bytes()).hexdigest()


def main(arguments: dict[str, Any]) -> None:
    from scarcade.jobs.train import train

    train(arguments["data"], arguments["model"], out=arguments["out"], settings=arguments["settings"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
