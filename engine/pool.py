"""Rows or genes on threads: they are dealt in chunks to as many threads as torch is allowed.

What a thread does with torch for its own rows, it does alone: torch has one thread there. The threads are torch's own
team, through ``GOMP_parallel`` of the library that torch brings: they are awake if torch has just computed, and between
two operations they look for work before they sleep (`engine.openmp`), so that a pool beside them would get no core.
Where torch has no such library, or its threads sleep at once, they are a pool of our own.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scarcade.engine.openmp import spins

_allowed = threading.local()  # threads of this thread while it is `alone`
CHUNK = 32  # rows, or units that lie side by side: two lines of a cache
Body = Callable[[], None]
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def threads() -> int:
    """How many threads may share the work of this one, which is among them."""
    return getattr(_allowed, "n", 0) or torch.get_num_threads()


@contextmanager
def alone() -> Iterator[None]:
    """Within the block torch's operations stay on this thread; `run` and `together` have as many as before.

    Torch, and the MKL in it, share out even an exponential of a hundred numbers. To have another thread take part costs
    more than the operation, and where another process has the core of that thread, milliseconds: all wait until the
    system lets it go on. In a step of some hundred operations that is twenty times the step.
    """
    n, before = torch.get_num_threads(), getattr(_allowed, "n", 0)
    if n == 1:
        yield
        return
    _allowed.n = n
    torch.set_num_threads(1)  # of this thread: each has a number of its own
    try:
        yield
    finally:
        torch.set_num_threads(n)
        _allowed.n = before


def as_shared_by(model: nn.Module) -> AbstractContextManager[None]:
    """`alone`, if what is large in the model's steps goes through `run` or `together` by itself."""
    return alone() if getattr(model, "compiled", False) else nullcontext()


@contextmanager
def together() -> Iterator[None]:
    """Within the block torch's operations are shared by all threads, also where this one is `alone`."""
    n = getattr(_allowed, "n", 0)
    if not n:
        yield
        return
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def run(
    n_rows: int,
    work: Callable[[int, int], None],
    *,
    chunk: int = CHUNK,
    on: Callable[[Body, int], None] | None = None,
) -> None:
    """``work(start, stop)`` over all rows, on as many threads as torch is allowed, cut between chunks.

    Args:
        chunk: rows that are not parted.
        work: should let go of the interpreter lock. What it raises is raised here.
        on: calls a function on n threads, this one among them; default: `team`, or `pool` (see above).
    """
    n_chunks = -(-n_rows // chunk)
    n_threads = max(1, min(threads(), n_chunks))
    if n_threads == 1:
        work(0, n_rows)
        return
    cuts = [min(n_rows, chunk * (n_chunks * i // n_threads)) for i in range(n_threads)] + [n_rows]
    left = iter(list(pairwise(cuts)))  # a list's iterator gives each of its items to one thread
    failures: list[BaseException] = []

    def body() -> None:
        try:
            for start, stop in left:
                work(start, stop)
        except BaseException as failure:  # noqa: BLE001 - raised below: it cannot cross the frames of C
            failures.append(failure)

    (on or (team if spins and _of_torch() is not None else pool))(body, n_threads)
    if failures:
        raise failures[0]


def pool(body: Body, n_threads: int) -> None:
    """Call `body` on this thread and on threads of our own."""
    others = [_helpers(n_threads - 1).submit(body) for _ in range(n_threads - 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread: each has a number of its own
    try:
        body()
    finally:
        torch.set_num_threads(before)
        for other in others:
            other.result()


def team(body: Body, n_threads: int) -> None:
    """Call `body` on the threads of torch's OpenMP, within which torch itself computes on one.

    Ctrl-C can fall between C and `body`, where Python would print the exception and go on: it is raised here.
    """
    called = _BODY(call := lambda _: body())
    if threading.get_ident() != threading.main_thread().ident:  # Python handles signals in the main thread alone
        _of_torch()(called, None, n_threads, 0)
        return
    lost: list[BaseException] = []
    before = sys.unraisablehook

    def keep(unraisable: Any) -> None:
        # until Python 3.12 it names the function, since then in its message alone
        if unraisable.object is call or repr(call) in (unraisable.err_msg or ""):
            lost.append(unraisable.exc_value)
        else:
            before(unraisable)

    sys.unraisablehook = keep
    try:
        _of_torch()(called, None, n_threads, 0)
    finally:
        sys.unraisablehook = before
    if lost:
        raise lost[0]


@cache
def _of_torch() -> Any:
    """``GOMP_parallel(function, data, threads, flags)`` of the libgomp that torch brings; None without one."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not libraries or not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    parallel = ctypes.CDLL(str(libraries[0])).GOMP_parallel  # it is loaded already: this is the same one
    parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _helpers(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="rows", initializer=_compute_alone)


def _compute_alone() -> None:
    """Give torch one thread in this thread.

    It takes over the number of whoever set one last when it is first asked in a thread, which must not be later.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_helpers.cache_clear)  # a forked process has none of these threads
