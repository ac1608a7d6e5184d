"""What a Ray worker does with a pack of queries: map them, commit each, tell of each."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from scarcade.engine.config import checked
from scarcade.engine.errors import ClusterError
from scarcade.engine.memory import hold_to
from scarcade.engine.world import use_threads
from scarcade.jobs.lanes import map_in_lanes
from scarcade.jobs.last_words import speaking
from scarcade.jobs.queries import Task
from scarcade.jobs.query_task import Job, MapConfig
from scarcade.jobs.results import Record, Results
from scarcade.jobs.shared_reference import unpacked


def map_pack(
    tasks: Sequence[Task], keys: Mapping[str, str], ident: str, shared: Mapping[str, Any]
) -> Iterator[tuple[str, Record]]:
    """(name, record) of each query of a pack as it is done.

    Args:
        ident: names this attempt. shared: {"shared": what `map_on_ray` put into the object store}.

    Raises:
        ClusterError: the folder of the results is not that of the driver.
    """
    values = _fetched(shared["shared"])
    _check_meeting(Path(values["meeting"]))
    with speaking(Path(values["out"]), ident):
        job, threads = _job(shared["shared"]), values["threads"]
        yield from map_in_lanes(job, tasks, keys, lambda name, line: None, threads=threads)


@lru_cache(maxsize=1)
def _fetched(shared: Any) -> Mapping[str, Any]:
    """What all packs of a mapping share, once a process."""
    import ray

    values: Mapping[str, Any] = ray.get(shared)
    use_threads(values["threads"])
    return values


@lru_cache(maxsize=1)
def _job(shared: Any) -> Job:
    values = _fetched(shared)
    config = checked(MapConfig, values["config"])
    hold_to(config.scale.memory)  # before anything large is made: what is there counts
    results = Results(Path(values["out"]), config.results)
    return Job(unpacked(values["reference"]), config, results, values["projection"])


def _check_meeting(path: Path) -> None:
    """Whether the file that the driver has just made is here: else nobody would look where the results go."""
    if not path.is_file():
        raise ClusterError(
            f"--out {path.parent.parent}: the worker on {os.uname().nodename} does not see the folder that this "
            "command writes to; on a cluster it must lie on storage that all nodes share, and only one command at a "
            "time may write to it"
        )
