"""The profile of a training: ``OUT/profile.json``, a table for people, and traces in ``OUT/profile``."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from scarcade.engine.contracts import Loader
from scarcade.engine.folder import write_json
from scarcade.engine.profile import PARTS, Stopwatch, of_all_workers
from scarcade.engine.world import World
from scarcade.jobs.console import table
from scarcade.jobs.run_folder import RunFolder

FILE, TRACES = "profile.json", "profile"
_SAVING = "saving the model"  # by rank 0 alone, with the latent of the cells
_COLUMNS = 8  # workers that a table has a column each for
_SHOWN_S = 0.005


class Profiled:
    """The profile of one worker's `work`.

    Args:
        began: when the command did, as ``time.time()``.
    """

    def __init__(self, world: World, folder: RunFolder, began: float) -> None:
        self.watch = Stopwatch(world, began, folder.local / TRACES)
        self._world, self._folder = world, folder
        self._workers: list[dict[str, float]] = []

    def trained(self, loader: Loader) -> None:
        """The training is over: what remains is the work of rank 0. Called by all workers."""
        self._workers = of_all_workers(self.watch.read(loader.waited), self._world)
        self._since = time.perf_counter()

    def written(self, saved: bool) -> dict[str, Any] | None:
        """Write the profile on rank 0; what it says."""
        traces = self._folder.local / TRACES
        if self._folder.mirror is not None and (own := traces / f"trace-{self._world.rank}.json").exists():
            self._folder.mirror.push_file(own, f"{TRACES}/{own.name}")
        if not self._world.first:
            return None
        workers = [{**parts, _SAVING: 0.0} for parts in self._workers]
        if saved:
            workers[0][_SAVING] = time.perf_counter() - self._since
        told = {
            "steps": self.watch.steps,
            "device": str(self._world.device),
            "workers": [
                {
                    "rank": rank,
                    "wall_s": round(sum(parts.values()), 3),
                    "seconds": {name: round(value, 4) for name, value in parts.items()},
                    "share": {name: round(value / sum(parts.values()), 5) for name, value in parts.items()},
                }
                for rank, parts in enumerate(workers)
            ],
        }
        write_json(self._folder.local / FILE, told)
        if self._folder.mirror is not None:
            self._folder.mirror.push_file(self._folder.local / FILE, FILE)
        return told


def profile_table(told: Mapping[str, Any]) -> str:
    """What is in ``profile.json``, for people: seconds of each worker, or of many workers the mean and the extremes."""
    workers: Sequence[Mapping[str, Any]] = told["workers"]
    if len(workers) <= _COLUMNS:
        head = [f"worker {one['rank']}" for one in workers] if len(workers) > 1 else ["seconds"]
    else:
        head = ["mean", "least", "most"]
    wall = sum(one["wall_s"] for one in workers)
    rows = []
    for part in (*PARTS, _SAVING, None):
        values = [one["seconds"][part] if part else one["wall_s"] for one in workers]
        if max(values) < _SHOWN_S:
            continue
        shown = values if len(workers) <= _COLUMNS else [sum(values) / len(values), min(values), max(values)]
        rows.append([part or "in all", *(f"{value:.2f}" for value in shown), f"{100 * sum(values) / wall:.1f}%"])
    return table(["part", *head, "share"], rows)
