"""Queries as Ray tasks, a bounded number at a time; one that kills its worker is tried again, then set aside.

A task is given paths and settings, writes its own results, and returns only its record, so nothing of a query's size
passes through the driver. The reference is read once in each worker process.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from scarcade.engine.cluster import cluster
from scarcade.engine.config import checked
from scarcade.engine.errors import ClusterError
from scarcade.engine.world import cores, use_threads
from scarcade.jobs.one_query import Reference, TransferConfig, load_reference
from scarcade.jobs.pack_task import map_tasks
from scarcade.jobs.projection import Projection
from scarcade.jobs.queries import Task
from scarcade.jobs.query_task import Job, MapConfig, failed
from scarcade.jobs.results import Record, Results

ATTEMPTS = 2  # of a query whose worker dies


def map_on_ray(job: Job, tasks: Sequence[Task], keys: Mapping[str, str]) -> Iterator[tuple[str, Record]]:
    """(name, record) of each query, as it is done.

    Raises:
        ClusterError: Ray could not be reached.
    """
    import ray

    scale = job.config.scale
    threads = scale.threads or max(1, cores() // scale.workers)
    with cluster(scale.address, cpus=max(cores(), scale.workers * threads)):
        # CPU time is reserved for as many tasks as there are workers; a task whose process dies is handed back to us
        # (no retry by Ray), because the one that killed it is to be known.
        remote = ray.remote(num_cpus=scale.cpus_per_worker or threads, max_retries=0, max_calls=0)(_map_in_worker)
        shared = ray.put(Shared.of(job))
        waiting = [(task, 1) for task in tasks]
        running: dict[Any, tuple[Task, int]] = {}
        while waiting or running:
            while waiting and len(running) < scale.workers:
                task, attempt = waiting.pop(0)
                running[remote.remote(task, keys[task.name], threads, shared)] = task, attempt
            (ready,), _ = ray.wait(list(running), num_returns=1)
            task, attempt = running.pop(ready)
            try:
                record = ray.get(ready)
            except ray.exceptions.RayError as error:
                if attempt < ATTEMPTS:
                    waiting.append((task, attempt + 1))
                    continue
                record = failed(task, job.reference.schema, _lost(error), 0.0)
                job.results.write_record(record)
            yield task.name, record


def _lost(error: Exception) -> ClusterError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ClusterError(f"its worker was lost {ATTEMPTS} times ({type(error).__name__}: {reason})")


@dataclass(frozen=True)
class Shared:
    """What every task is given, once through the object store."""

    reference: Path
    config: dict[str, Any]
    out: Path
    projection: Projection | None

    @classmethod
    def of(cls, job: Job) -> "Shared":
        config = job.config.model_dump(mode="json")
        return cls(job.reference.path.resolve(), config, job.results.out.resolve(), job.projection)


def _map_in_worker(task: Task, key: str, threads: int, shared: Shared) -> Record:
    """What a task runs."""
    use_threads(threads)
    config = checked(MapConfig, shared.config)
    reference = _reference(shared.reference, config.transfer.model_dump_json(), config.seed)
    job = Job(reference, config, Results(shared.out, config.results), shared.projection)
    ((_, record),) = map_tasks(job, [task], {task.name: key}, lambda name, line: None)
    return record


@lru_cache(maxsize=1)
def _reference(path: Path, transfer: str, seed: int) -> Reference:
    return load_reference(path, TransferConfig.model_validate_json(transfer), seed=seed)
