"""Large arrays whose memory is used again when the last view into them is gone.

A fresh one costs its page faults: on virtual machines more than what is then written into it. Ingest makes some thirty
bytes of such arrays for each count, all of the same few sizes.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_SMALL = 1 << 18  # bytes: less than this malloc keeps by itself
_MOST = 1 << 28  # bytes that are kept for later
_WASTE = 2  # times the memory that is needed: what is larger waits for larger arrays
_lock = threading.RLock()  # an array may be collected, and its memory come back, while this thread asks for some
_free: list[np.ndarray] = []
_users = 0


@contextmanager
def reusing() -> Iterator[None]:
    """While the block runs, in all threads of the process, `empty` uses memory again; then it is let go of."""
    global _users  # noqa: PLW0603  memory is of the process
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _free.clear()


def empty(n: int, dtype: Any) -> np.ndarray:
    """(n,), not initialised, as `numpy.empty`; its memory may be that of an array which nobody can see any more."""
    dtype = np.dtype(dtype)
    n_bytes = n * dtype.itemsize
    if _users == 0 or n_bytes < _SMALL:
        return np.empty(n, dtype)
    memory, lease = _taken(n_bytes), Lease()
    weakref.finalize(lease, _give_back, memory).atexit = False
    return Lent(memory[:n_bytes].view(dtype), lease).array()


def _taken(n_bytes: int) -> np.ndarray:
    with _lock:
        fitting = [k for k, memory in enumerate(_free) if n_bytes <= memory.nbytes <= _WASTE * n_bytes]
        if fitting:
            return _free.pop(min(fitting, key=lambda k: _free[k].nbytes))
    return np.empty(n_bytes + (n_bytes >> 3), np.uint8)


def _give_back(memory: np.ndarray) -> None:
    with _lock:
        if _users == 0:
            return
        _free.append(memory)
        while sum(one.nbytes for one in _free) > _MOST:
            _free.pop(0)


class Lease:
    """Of buffers that end their loan together."""

    __slots__ = ("__weakref__",)


class Lent:
    """Memory as numpy asks for it: an array made of it, and every view into that, holds this, and so the lease."""

    __slots__ = ("__array_interface__", "lease")

    def __init__(self, buffer: np.ndarray, lease: Lease) -> None:
        self.__array_interface__ = buffer.__array_interface__
        self.lease = lease

    def array(self) -> np.ndarray:
        return np.asarray(self)
