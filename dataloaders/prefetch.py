"""Makes the next items of an iterator in a thread while the consumer works on this one.

How far it runs ahead is bounded: an item is begun only when the consumer has taken the one `ahead` before it
(or, with ``manual``, when the consumer has said `proceed` once for each it took, which it does when it has let
go of the item before; so that never more than `ahead` + 1 items are alive).
Errors of the thread are raised where the item was wanted. Closing stops the thread and waits for it.

`SideBySide` makes several items at a time, each in a thread of its own.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from scarcade.dataloaders.fetchers import Fetchers

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator over `source`, which runs in a thread of its own, at most `ahead` items in advance."""

    def __init__(self, source: Iterator[T], ahead: int = 1, *, manual: bool = False) -> None:
        self.waited = 0.0  # seconds
        self._items: queue.SimpleQueue[tuple[bool, object]] = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._stop = threading.Event()
        self._over = False
        self._manual = manual
        self._thread = threading.Thread(
            target=_produce, args=(source, self._items, self._room, self._stop), name="scarcade-prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        began = time.perf_counter()
        made, item = self._items.get()
        self.waited += time.perf_counter() - began
        if made:
            if not self._manual:
                self.proceed()
            return item  # type: ignore[return-value]
        self.close()
        if item is None:
            raise StopIteration
        raise item  # type: ignore[misc]

    def proceed(self) -> None:
        """Let the thread begin one more item."""
        self._room.release()

    def close(self) -> None:
        """Stop the thread and wait until it has ended; what it had made is dropped."""
        self._over = True
        self._stop.set()
        self._room.release()
        self._thread.join()
        while not self._items.empty():
            self._items.get()


def _produce(
    source: Iterator[object],
    items: "queue.SimpleQueue[tuple[bool, object]]",
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """Holds no reference to the `Prefetch`, so that one that is forgotten can be collected."""
    try:
        while True:
            room.acquire()
            if stop.is_set():
                return
            try:
                item = next(source)
            except StopIteration:
                items.put((False, None))
                return
            items.put((True, item))
            del item  # the consumer alone decides how long it lives
    except BaseException as error:  # noqa: BLE001 - raised in the consumer
        items.put((False, error))


class SideBySide(Generic[T]):
    """What some calls return, in their order, `n` of them being made at a time; 1: by whoever asks for the results."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._threads: Fetchers[T] = Fetchers(n)

    def results(self, calls: Iterator[Callable[[], T]]) -> Iterator[T]:
        """The calls must not mind each other. What one raises is raised where its result is wanted."""
        if self.n == 1:
            for call in calls:
                yield call()
            return
        making: deque[Future[T]] = deque()
        try:
            while True:
                while len(making) < self.n and (coming := next(calls, None)) is not None:
                    making.append(self._threads.submit(coming))
                if not making:
                    return
                yield making.popleft().result()
        finally:
            wait([one for one in making if not one.cancel()])
