"""A training on a cluster whose workers write down which cells they met. The driver is a process of its own.

It is `scarcade.engine.launch.run` with a work of its own: real store, loader, model and checkpoints, at a pace that
leaves time to hurt it.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scarcade.dataloaders.loader import CellLoader, LoaderConfig, stream
from scarcade.dataloaders.store import open_store
from scarcade.engine.checkpoint import CheckpointConfig, Checkpoints
from scarcade.engine.contracts import Batch
from scarcade.engine.interrupts import Interrupts
from scarcade.engine.launch import Worker, run
from scarcade.engine.loop import fit
from scarcade.engine.metrics import MetricsFile
from scarcade.engine.optim import OptimConfig
from scarcade.engine.scale import Scale
from scarcade.engine.schema import Shard
from scarcade.models.scvi import Scvi
from tests.cluster.nodes import ROOT, Nodes

EPOCHS, BATCH, LANES, SEED = 3, 32, 8, 1


def cells_of(store: Path, shard: Shard) -> Any:
    """The loader of one worker."""
    config = LoaderConfig(batch_size=BATCH, validation=0)
    return stream(open_store(store), "train", config, seed=SEED, shard=shard, lanes=LANES)


class Recorded:
    """A loader that writes down the rows of each batch before it gives it, one file for each worker."""

    def __init__(self, loader: CellLoader, path: Path, group: str, pace_s: float) -> None:
        self._loader, self._path, self._group, self._pace = loader, path, group, pace_s
        self.n_cells, self.steps_per_epoch = loader.n_cells, loader.steps_per_epoch

    @property
    def waited(self) -> float:
        return float(self._loader.waited)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(self._loader.epoch(epoch, start), start):
            time.sleep(self._pace)
            line = {"group": self._group, "epoch": epoch, "step": step, "rows": batch.rows.tolist()}
            with open(self._path, "a") as file:
                file.write(json.dumps(line) + "\n")
            yield batch


def record(worker: Worker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What each worker does."""
    out, world = Path(arguments["out"]), worker.world
    group = world.say({"group": f"{time.time():.3f}"})["group"]
    worker.tell({"began": world.size, "pid": os.getpid(), "time": time.time()})
    loader = Recorded(
        cells_of(Path(arguments["store"]), world.shard),
        out / f"rows-{group}-{world.rank}.jsonl",
        group,
        arguments["pace"],
    )
    store = open_store(arguments["store"])
    model = Scvi(Scvi.Config(n_hidden=8, n_latent=3, use_batch_norm="none"), store.schema, seed=SEED)
    result = fit(
        model,
        loader,  # type: ignore[arg-type]
        None,
        OptimConfig(epochs=EPOCHS, log_every=1),
        world=world,
        seed=SEED,
        checkpoints=Checkpoints(
            out / "checkpoints",
            CheckpointConfig(every_steps=5, every_seconds=None),
            about={"data": store.fingerprint},
            world=world,
            announce=worker.announce,
        ),
        metrics=MetricsFile(out / "metrics.jsonl"),
        progress=worker.tell,
        stop=worker.stop,
    )
    weights = {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()}
    return {"stopped": result.stopped, "steps": result.steps, "weights": weights}


class Recording:
    """The driver of such a training in a process of its own, and what it told."""

    def __init__(self, nodes: Nodes, store: Path, out: Path, *, pace: float = 0.15, **scale: Any) -> None:
        self.out, self._log = out, out.with_suffix(".told")
        self.errors = out.with_suffix(".stderr")
        out.mkdir()
        arguments = {"store": str(store), "out": str(out), "pace": pace}
        given = {"threads": 1, "address": nodes.address, **scale}
        # imported, not run as __main__, so that the workers find its work by name
        code = "import json, sys; from tests.cluster.recorded import main; main(*json.loads(sys.argv[1]))"
        command = [sys.executable, "-W", "ignore", "-c", code, json.dumps([arguments, given])]
        environment = {**os.environ, **nodes.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self._log, "w") as log, open(self.errors, "w") as errors:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=errors)

    def told(self) -> list[dict[str, Any]]:
        """What the driver told until now."""
        lines = self._log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def sentences(self) -> list[str]:
        return [line.get("note") or line.get("warning", "") for line in self.told() if {"note", "warning"} & set(line)]

    def groups(self) -> list[int]:
        """Sizes of the groups of workers that began, in order."""
        return [line["began"] for line in self.told() if "began" in line]

    def first_rank(self) -> int:
        """Process of rank 0 of the newest group."""
        return int(next(line["pid"] for line in reversed(self.told()) if "began" in line))

    def reach(self, groups: int, steps: int, timeout: float = 200) -> float:
        """Wait until the group of this number (from 1) has made so many steps; the time of the last one."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            told = self.told()
            begun = [i for i, line in enumerate(told) if "began" in line]
            if len(begun) >= groups:
                made = [line for line in told[begun[groups - 1] :] if "step" in line]
                if len(made) >= steps:
                    return float(made[steps - 1]["time"])
            assert self.process.poll() is None, self.errors.read_text()[-3000:]
            time.sleep(0.05)
        raise AssertionError(f"{self.sentences()}\n{self.errors.read_text()[-3000:]}")

    def result(self, timeout: float = 280) -> dict[str, Any]:
        """What the training returned."""
        assert self.process.wait(timeout) == 0, self.errors.read_text()[-3000:]
        return dict(self.told()[-1]["result"])

    def kill(self) -> None:
        """End the driver, if it is still there."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def rows(self) -> dict[tuple[int, int], list[int]]:
        """(epoch, step) -> rows of the whole batch, sorted, as the group met them that made the step for good."""
        parts: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for path in self.out.glob("rows-*.jsonl"):
            for text in path.read_text().splitlines(keepends=True):
                if text.endswith("\n"):
                    line = json.loads(text)
                    parts[line["epoch"], line["step"]][line["group"]] += line["rows"]
        return {where: sorted(groups[max(groups)]) for where, groups in parts.items()}


def expected_rows(store: Path) -> dict[tuple[int, int], list[int]]:
    """What `Recording.rows` says of a training that nothing happens to."""
    loader = cells_of(store, Shard())
    return {
        (epoch, step): np.sort(batch.rows).tolist()
        for epoch in range(EPOCHS)
        for step, batch in enumerate(loader.epoch(epoch))
    }


def main(arguments: dict[str, Any], scale: dict[str, Any]) -> None:
    result = run(
        record,
        arguments,
        Scale(**scale),
        arguments["out"],
        tell=lambda message: print(json.dumps(dict(message)), flush=True),
        interrupts=Interrupts(),
    )
    print(json.dumps({"result": result}), flush=True)
