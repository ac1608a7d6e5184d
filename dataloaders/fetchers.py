"""Threads that fetch in the background, a few at a time; they end with the process, whatever they are doing.

(Those of concurrent.futures would finish all that was asked for before the process may end: gigabytes, after Ctrl-C.)
"""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
_LAST_S = 5.0  # to let a request that is on its way end at exit: the library below is torn down then


class Fetchers(Generic[T]):
    """`n` threads, started when the first work comes."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._work: queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end, self._work, self._threads)

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Have `work` done; what it returns or raises is in the future."""
        future: Future[T] = Future()
        with self._lock:
            if not self._threads:
                for _ in range(self._n):
                    thread = threading.Thread(target=_run, args=(self._work,), name="scarcade-fetch", daemon=True)
                    thread.start()
                    self._threads.append(thread)
        self._work.put((future, work))
        return future


def _run(work: "queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None]") -> None:
    while (item := work.get()) is not None:
        future, action = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(action())
            except BaseException as error:  # noqa: BLE001 - raised where the result is wanted
                future.set_exception(error)
        del item, future, action


def _end(work: "queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None]", threads: list[threading.Thread]) -> None:
    while True:
        try:
            item = work.get_nowait()
        except queue.Empty:
            break
        if item is not None:
            item[0].cancel()
    for _ in threads:
        work.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_LAST_S / max(1, len(threads)))
