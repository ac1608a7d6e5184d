"""Packs side by side in one process: each of a few threads has one, and takes the next query when it has room.

A pack's steps are many small operations; one that shares each of them out among threads waits for the slower one at
every turn. Threads of their own meet only where they take a query and where they hand over a record, and while one
reads or writes, the others compute. What becomes of a query does not depend on its company, so it does not matter in
which lane it was.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scarcade.engine.world import use_threads
from scarcade.jobs.pack_task import map_tasks
from scarcade.jobs.queries import Task
from scarcade.jobs.query_task import Job, Told
from scarcade.jobs.results import Record

FEW = 2  # queries for each lane, at least: else all threads work on one pack


def map_in_lanes(
    job: Job, tasks: Sequence[Task], keys: Mapping[str, str], say: Told, *, threads: int
) -> Iterator[tuple[str, Record]]:
    """As `map_tasks`, with `threads` threads in all."""
    if threads == 1 or len(tasks) < FEW * threads:
        use_threads(threads)
        yield from map_tasks(job, tasks, keys, say)
        return
    use_threads(1)
    lanes = _Lanes(job, tasks, keys, say)
    try:
        yield from lanes.run(threads)
    finally:
        lanes.stop()


class _Lanes:
    """The queries that wait, and what the threads say."""

    def __init__(self, job: Job, tasks: Sequence[Task], keys: Mapping[str, str], say: Told) -> None:
        self._job, self._keys, self._say = job, keys, say
        self._waiting = deque(tasks)
        self._said: queue.SimpleQueue[tuple[str, Record] | BaseException | None] = queue.SimpleQueue()
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []

    def run(self, n: int) -> Iterator[tuple[str, Record]]:
        self._threads = [threading.Thread(target=self._lane, name=f"lane-{i}", daemon=True) for i in range(n)]
        for thread in self._threads:
            thread.start()
        left = n
        while left:
            said = self._said.get()
            if said is None:
                left -= 1
            elif isinstance(said, BaseException):
                raise said
            else:
                yield said

    def stop(self) -> None:
        """Let the threads end after the step they are at."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _lane(self) -> None:
        try:
            for found in map_tasks(self._job, self._waiting, self._keys, self._told, stopped=self._stop.is_set):
                self._said.put(found)
            self._said.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the records are wanted
            self._said.put(error)

    def _told(self, name: str, line: Mapping[str, Any]) -> None:
        with self._lock:  # whoever listens need not know that there are threads
            self._say(name, line)
