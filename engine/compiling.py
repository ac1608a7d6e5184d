"""Tells a person that code is being compiled: once after an installation, for most of a minute, and nothing moves."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_AFTER = 2.0  # seconds of compiling after which it is told: what is short need not be explained
_TOLD = "compiling for this processor, which takes up to a minute, and only the first time after an installation"


@contextmanager
def told_of_compiling(tell: Callable[[str], Any]) -> Iterator[None]:
    """Within the block `tell` is given a sentence once numba has been compiling for a while in this process."""
    from numba.core import event

    listener = _listener(event.Listener, tell)
    with event.install_listener("numba:run_pass", listener):  # "compile" is also what is read from the cache
        yield


def _listener(base: Any, tell: Callable[[str], Any]) -> Any:
    class Telling(base):  # type: ignore[misc]
        """Adds up the passes of the compiler."""

        def __init__(self) -> None:
            self._lock, self._began, self._spent, self._said = threading.Lock(), 0.0, 0.0, False

        def on_start(self, _: Any) -> None:
            with self._lock:
                self._began = time.perf_counter()

        def on_end(self, _: Any) -> None:
            with self._lock:  # passes may lie within each other: each moment counts once
                now = time.perf_counter()
                self._spent, self._began = self._spent + now - self._began, now
                say = not self._said and self._spent > _AFTER
                self._said = self._said or say
            if say:
                tell(_TOLD)

    return Telling()
