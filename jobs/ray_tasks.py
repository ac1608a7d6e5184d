"""Packs of queries as Ray tasks, a bounded number at a time; the query that brings a worker down fails alone.

A worker commits what it maps itself and returns small records, so nothing of a query's size passes through the driver.
What comes of a query does not depend on its pack. So a worker that dies costs little: what it had committed is there,
and each of its other queries is tried again in a pack of its own. Only one that takes a second worker with it, alone,
is set aside. A node that dies is nobody's fault and is not counted against a query.
"""

import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from scarcade.engine.cluster import Room, check_alive, cluster
from scarcade.engine.cores import cores
from scarcade.engine.errors import ClusterError, MemoryLimitError, StorageError
from scarcade.engine.memory import ran_out
from scarcade.jobs.last_words import PREFIX, last_words
from scarcade.jobs.map_scale import MapScale
from scarcade.jobs.map_worker import map_pack
from scarcade.jobs.queries import Task
from scarcade.jobs.query_task import Job, failed
from scarcade.jobs.results import RECORDS, Record
from scarcade.jobs.shared_reference import n_bytes, packed

_LOOK_S = 5.0  # without news, how often to look whether the cluster is still there
_MEETING = ".meeting-"
_STORE_MB = 256  # of the object store of a private session, beside the reference


@dataclass(frozen=True)
class Pack:
    """Queries that one Ray task maps."""

    tasks: tuple[Task, ...]
    again: str | None = None  # why it is tried again, alone
    fresh: bool = False  # in a process that nothing was mapped in before
    lost: int = 0  # nodes that died under it

    @property
    def name(self) -> str:
        """How Ray calls it, in its logs and in the title of the process."""
        more = f"+{len(self.tasks) - 1}" if len(self.tasks) > 1 else ""
        return f"map:{self.tasks[0].name}{more}"


@dataclass
class _Running:
    """A pack that was given to Ray."""

    pack: Pack
    ident: str
    left: dict[str, Task]  # of which no record has come
    began: float = field(default_factory=time.monotonic)


def map_on_ray(job: Job, packs: Sequence[Sequence[Task]], keys: Mapping[str, str]) -> Iterator[tuple[str, Record]]:
    """(name, record) of each query of `packs`, as it is done.

    Raises:
        ClusterError: Ray could not be reached, cannot give what a worker is to have, or is gone.
    """
    scale = job.config.scale
    threads = scale.threads or max(1, cores() // scale.workers)
    cpus = scale.cpus_per_worker or threads
    reference = packed(job.reference)
    most = max(cores(), int(scale.workers * cpus + 0.999))
    store_mb = _STORE_MB + (2 * n_bytes(reference) >> 20)
    with cluster(scale.address, cpus=most, object_store_mb=store_mb), _meeting_point(job) as meeting:
        shared = {
            "reference": reference,
            "config": job.config.model_dump(mode="json"),
            "out": str(job.results.out.resolve()),
            "projection": job.projection,
            "meeting": meeting,
            "threads": threads,
        }
        needed = {"CPU": float(cpus)} | ({"GPU": 1.0} if scale.gpus else {})
        needed |= {"memory": float(scale.memory)} if scale.memory else {}
        yield from _Window(job, keys, ray.put(shared), needed).map([Pack(tuple(pack)) for pack in packs])


@contextmanager
def _meeting_point(job: Job) -> Iterator[str]:
    """A file in the folder of the results: a worker that does not see it would write elsewhere."""
    folder = job.results.out.resolve() / RECORDS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in (*folder.glob(f"{_MEETING}*"), *folder.glob(f"{PREFIX}*")):  # by drivers that were killed
            left.unlink(missing_ok=True)
        path = folder / f"{_MEETING}{uuid.uuid4().hex}"  # a new name, which no node can remember as not being there
        path.touch()
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


class _Window:
    """As many packs with Ray as there are workers, and what to do when one comes to grief."""

    def __init__(self, job: Job, keys: Mapping[str, str], shared: Any, needed: Mapping[str, float]) -> None:
        self._job, self._keys, self._shared = job, keys, shared
        self._scale: MapScale = job.config.scale
        self._room = Room(needed, self._scale.start_seconds)
        options: dict[str, Any] = {
            "num_returns": "streaming",
            "num_cpus": needed["CPU"],
            "num_gpus": needed.get("GPU", 0.0),
            "max_retries": 0,
        }
        if "memory" in needed:
            options["memory"] = int(needed["memory"])
        # Ray does not retry by itself: who kills a worker is to be known, and not to kill a third.
        self._remote, self._fresh = (ray.remote(max_calls=calls, **options)(map_pack) for calls in (0, 1))
        self._waiting: list[Pack] = []
        self._running: dict[Any, _Running] = {}

    def map(self, packs: Sequence[Pack]) -> Iterator[tuple[str, Record]]:
        """(name, record) of each query."""
        self._waiting = list(packs)
        self._room.wait()
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._scale.workers:
                    self._submit(self._waiting.pop(0))
                ready, _ = ray.wait(list(self._running), num_returns=1, timeout=_LOOK_S, fetch_local=False)
                if not ready:
                    self._room.look()
                    continue
                self._room.news()
                yield from self._received(ready[0])
        except ClusterError:
            raise  # there may be no cluster to speak to
        except BaseException:
            for stream in self._running:  # the session may be the user's own, and go on
                ray.cancel(stream, force=True)
            raise

    def _submit(self, pack: Pack) -> None:
        ident = uuid.uuid4().hex
        remote = self._fresh if pack.fresh else self._remote
        keys = {task.name: self._keys[task.name] for task in pack.tasks}
        # within a dictionary Ray passes the reference to the object on: a worker fetches it once, not for each pack
        stream = remote.options(name=pack.name).remote(list(pack.tasks), keys, ident, {"shared": self._shared})
        self._running[stream] = _Running(pack, ident, {task.name: task for task in pack.tasks})

    def _received(self, stream: Any) -> Iterator[tuple[str, Record]]:
        """The next record of a pack, or what became of those that it left behind."""
        running = self._running[stream]
        try:
            name, record = ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
            yield from self._left_behind(running, "its worker ended without a word of it", None)
        except ray.exceptions.RayError as error:
            del self._running[stream]
            yield from self._after(running, error)
        else:
            task = running.left.pop(name)
            pack = running.pack
            if record.get("error") == MemoryLimitError.code and not pack.again:
                self._waiting.append(Pack((task,), again=record["reason"], fresh=True, lost=pack.lost))
                return
            if record.get("error") == MemoryLimitError.code:
                record = self._set_aside(running, task, MemoryLimitError(self._no_memory(task)))
            yield name, record

    def _after(self, running: _Running, error: Exception) -> Iterator[tuple[str, Record]]:
        """A pack's worker, node or program failed: those of its queries that are not done."""
        crash = last_words(self._job.results.out, running.ident)
        gone = (
            ray.exceptions.NodeDiedError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.LocalRayletDiedError,
            ray.exceptions.TaskUnschedulableError,
        )
        if isinstance(error, gone):
            yield from self._node_lost(running, error)
            return
        if isinstance(error, ray.exceptions.RayTaskError):  # raised in the worker, which lives
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, ClusterError):  # nobody's fault, and the same for all
                raise ClusterError(str(cause)) from error
            memory = ran_out(cause)
            reason = "out of memory" if memory else f"{type(cause).__name__}: {_first_line(cause)}"
            yield from self._left_behind(running, reason, None if memory else cause, fresh=memory)
        elif ran_out(error):
            reason = f"its worker was ended because its node ran out of memory ({_first_line(error)})"
            yield from self._left_behind(running, reason, MemoryLimitError(f"out of memory: {reason}"))
        else:
            yield from self._left_behind(running, crash, None)

    def _node_lost(self, running: _Running, error: Exception) -> Iterator[tuple[str, Record]]:
        check_alive()
        lost = running.pack.lost + 1
        left = tuple((yield from self._done_already(running)))
        if not left:
            return
        if 0 <= self._scale.max_failures < lost:
            for task in left:
                reason = f"its node was lost {lost} times ({_first_line(error)}); --scale.max-failures says how often"
                yield task.name, self._set_aside(running, task, ClusterError(reason))
            return
        self._waiting.insert(0, replace(running.pack, tasks=left, lost=lost))

    def _left_behind(
        self, running: _Running, reason: str, cause: Exception | None, *, fresh: bool = False
    ) -> Iterator[tuple[str, Record]]:
        """Try each query that has no result again, alone; set aside the one that was alone already."""
        pack = running.pack
        for task in (yield from self._done_already(running)):
            if pack.again is None:
                self._waiting.append(Pack((task,), again=reason, fresh=fresh, lost=pack.lost))
            elif cause is not None:
                yield task.name, self._set_aside(running, task, cause)
            elif fresh:
                yield task.name, self._set_aside(running, task, MemoryLimitError(self._no_memory(task)))
            else:
                told = f"{task.path}: failed twice, the second time alone in its worker: {reason}"
                yield task.name, self._set_aside(running, task, ClusterError(told))

    def _done_already(self, running: _Running) -> Generator[tuple[str, Record], None, list[Task]]:
        """Yields what was committed though its record did not come; returns the tasks that are left."""
        left = []
        for name, task in running.left.items():
            record = self._job.results.record(name, self._keys[name])
            if record is None:
                left.append(task)
            else:
                yield name, record
        return left

    def _set_aside(self, running: _Running, task: Task, error: Exception) -> Record:
        record = failed(task, self._job.reference.schema, error, time.monotonic() - running.began)
        self._job.results.write_record(record)
        return record

    def _no_memory(self, task: Task) -> str:
        limit = self._scale.memory_per_worker
        if limit is None:
            return f"{task.path}: ran out of memory, also alone in a worker; lower --workers or --batch-size"
        return (
            f"{task.path}: needs more than the {limit} of memory that a worker may have, also alone in one; raise "
            "--scale.memory-per-worker, or lower --batch-size"
        )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
