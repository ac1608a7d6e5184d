"""Where the time of a training goes: a stopwatch that is always on one part of the work, and a trace of a few steps.

Because the watch is never between two parts, the parts of a worker sum to its wall time. On a GPU, whose work is only
queued by the host, each change of part waits for the device: a profiled run is slower there by what the queue hid. A
run that is not profiled pays a call of an empty function for each change.
"""

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from scarcade.engine.errors import StorageError
from scarcade.engine.world import World

PARTS = (
    "start-up",
    "waiting for data",
    "preparing batches",
    "copying",
    "forward",
    "backward",
    "all-reduce",
    "optimiser",
    "metrics",
    "validation",
    "checkpoint",
    "tracing",
)
"""In the order of the table. ``waiting for data``: no batch was decoded yet; ``preparing batches``: the loader's own
work in this thread; ``all-reduce``: what of it the backward pass did not hide; ``metrics``: means and their file."""
LOADING = "loading"  # the two parts of it are told apart in the end, as the loader counts how long it waited
_TRACED = (5, 10)  # steps of this start of which there is a trace: the first are not like the others
_STEP_BEGINS = "copying"


class Stopwatch:
    """Seconds that one worker spent on each part, since `began`.

    Args:
        began: when the command did, as ``time.time()``; until the first call of `to` it is start-up.
        traces: folder for the trace.
    """

    def __init__(self, world: World, began: float, traces: Path) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._world, self._traces = world, traces
        self._since = time.perf_counter() - max(0.0, time.time() - began)
        self._part = PARTS[0]
        self._profiler: Any = None
        self._span: Any = None

    def to(self, part: str) -> None:
        """From now on time belongs to `part`."""
        if part == _STEP_BEGINS:
            self.steps += 1
            if self.steps == _TRACED[0]:
                self._turn("tracing")
                self._begin_trace()
            elif self.steps == _TRACED[1]:
                self._turn("tracing")
                self._end_trace()
        self._turn(part)

    def _turn(self, part: str) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        now = time.perf_counter()
        self.seconds[self._part] += now - self._since
        self._since, self._part = now, part
        if self._profiler is not None:  # the parts stand above the operators in the trace
            if self._span is not None:
                self._span.__exit__(None, None, None)
            self._span = torch.profiler.record_function(part)
            self._span.__enter__()

    def _begin_trace(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells on stderr that it begins
        from torch import profiler

        activities = [profiler.ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(profiler.ProfilerActivity.CUDA)
        self._profiler = profiler.profile(activities=activities)
        self._profiler.start()

    def _end_trace(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        self._span.__exit__(None, None, None)
        self._span = None
        profiler.stop()
        path = self._traces / f"trace-{self._world.rank}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except OSError as error:
            raise StorageError(f"{path}: the trace cannot be written ({error.strerror})") from error

    def read(self, waited: float) -> dict[str, float]:
        """Seconds by part until now; the loader says that it `waited` so many of them."""
        if self._profiler is not None:
            self._turn("tracing")
            self._end_trace()
        self._turn("metrics")
        found = dict(self.seconds)
        loading = found.pop(LOADING, 0.0)
        waiting = min(waited, loading)
        return {**found, "waiting for data": waiting, "preparing batches": loading - waiting}


def of_all_workers(own: dict[str, float], world: World) -> list[dict[str, float]]:
    """The parts of every worker, by rank, in the order of `PARTS`; called on all of them."""
    row = torch.tensor([[own.get(part, 0.0) for part in PARTS]], dtype=torch.float64, device=world.device)
    rows = world.gathered(row, [1] * world.size).tolist()
    return [dict(zip(PARTS, one, strict=True)) for one in rows]
