"""A crew: this thread and others, which wait, compute and meet without the interpreter.

Threads that share a product by Python each ask for the interpreter's lock between any two calls, and a thread that
waits for it sleeps: at a hundred cells that, and waking up, was a fifth of the last layer. Here a job is compiled code
that is given its place in memory; the threads of a crew meet within it, and one that has more to do than this one goes
on after it has returned (`engine.later`).

A job is ``void job(int64 record, int64 thread)``, compiled by `compiled`, the same code for all threads. It must not
fail: others would wait for it forever. What posts and what waits is compiled, too, so that Ctrl-C cannot fall in
between.
"""

# compiled with: 0939e7d79421

import ctypes
import os
import platform
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from scarcade.engine.addresses import address_of, caller, functions_in, numbers_at

PHASES = 4  # at the end of which the threads of a job may meet, each once
MOMENT, WHILE = 2_000, 20_000  # how often a thread looks before it sleeps: some 40 us; and if work is announced
_LINE = 64  # bytes: semaphores are apart from each other, or threads that look at them get in each other's way
# of the record that threads share
_N, _WAIT, _TRY, _POST, _FIRST, _JOB, _RECORD, _BEGUN, _ENDED, _ANNOUNCED = range(10)
_SIZE = 10
_of_semaphore: Any = caller(types.int32, types.int64)
_job: Any = caller(types.none, types.int64, types.int64)
_CALLED = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)  # lets go of the interpreter's lock


@njit(forceinline=True, error_model="numpy")
def _semaphore(shared: np.ndarray, group: int, thread: int) -> int:
    """Group 0 says that there is work, 1 that it is done, the others that a phase is."""
    return shared[_FIRST] + (group * shared[_N] + thread) * _LINE  # type: ignore[no-any-return]


@njit(forceinline=True, error_model="numpy")
def _wait(shared, semaphore, moment) -> None:  # type: ignore[no-untyped-def]
    for _ in range(moment):
        if _of_semaphore(shared[_TRY], (semaphore,)) == 0:
            return
    while _of_semaphore(shared[_WAIT], (semaphore,)) != 0:  # a signal came
        pass


@njit(forceinline=True, error_model="numpy")
def meet(crew: int, phase: int, thread: int) -> None:
    """Wait until all threads of the crew are here.

    Args:
        crew: `Crew.address`.
        phase: one of `PHASES`, each at most once in a job.
    """
    shared = numbers_at(crew, _SIZE)
    for other in range(shared[_N]):
        if other != thread:
            _of_semaphore(shared[_POST], (_semaphore(shared, 2 + phase, other),))
    for _ in range(shared[_N] - 1):
        _wait(shared, _semaphore(shared, 2 + phase, thread), MOMENT)


def _serve(crew, thread) -> None:  # type: ignore[no-untyped-def]
    """What the others do: a job whenever one has begun. A call without one is to be awake."""
    shared = numbers_at(crew, _SIZE)
    done, moment = np.int64(0), MOMENT
    while True:
        _wait(shared, _semaphore(shared, 0, thread), moment)
        if shared[_BEGUN] != done:
            if shared[_JOB] == 0:
                return
            _job(shared[_JOB], (shared[_RECORD], thread))
            done += 1
            _of_semaphore(shared[_POST], (_semaphore(shared, 1, 0),))
        moment = WHILE if shared[_ANNOUNCED] > done else MOMENT


def _call(crew, work) -> None:  # type: ignore[no-untyped-def]
    """Call the others, with `work` to the job, in which this thread takes part."""
    shared = numbers_at(crew, _SIZE)
    shared[_BEGUN] += work
    shared[_ANNOUNCED] = shared[_BEGUN] + 1 - work
    for other in range(1, shared[_N]):
        _of_semaphore(shared[_POST], (_semaphore(shared, 0, other),))
    if work and shared[_JOB]:
        _job(shared[_JOB], (shared[_RECORD], 0))


def _join(crew, moment) -> None:  # type: ignore[no-untyped-def]
    """Wait until the others have done what was begun."""
    shared = numbers_at(crew, _SIZE)
    while shared[_ENDED] < shared[_BEGUN]:
        for _ in range(1, shared[_N]):
            _wait(shared, _semaphore(shared, 1, 0), moment)
        shared[_ENDED] += 1


@cache
def compiled(code: Callable[..., None]) -> Any:
    """A function of two int64, compiled; its `address` is what other compiled code calls.

    It is kept on disk if a mark in its file says with what it was compiled (tests/models/test_compiled_with.py).
    """
    kept = code.__module__.startswith("scarcade.")
    return cfunc("void(int64, int64)", cache=kept, error_model="numpy")(code)


@cache
def _called(code: Callable[..., None]) -> Any:
    return _CALLED(compiled(code).address)


def can_be_had() -> bool:
    """Whether threads can wait for each other here: by the semaphores of Linux.

    On processors whose writes are seen in their order: a thread that was woken may find the record of a job that is
    begun a moment later.
    """
    return _functions() is not None


@cache
def _functions() -> tuple[int, ...] | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    return functions_in(ctypes.CDLL(None), ("sem_wait", "sem_trywait", "sem_post", "sem_init"))


class Crew:
    """This thread and ``n - 1`` others, for one job at a time.

    Attributes:
        address: what a job's record has, to `meet`.
    """

    def __init__(self, n: int) -> None:
        functions = _functions()
        assert functions is not None, "no semaphores"
        *each, make = functions
        self.n = n
        self._memory = np.zeros((2 + PHASES) * n * _LINE + _LINE, np.uint8)
        self._shared = np.zeros(_SIZE, np.int64)
        self.address = address_of(self._shared)
        first = -(-address_of(self._memory) // _LINE) * _LINE
        self._shared[: _FIRST + 1] = n, *each, first
        make_semaphore = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)(make)
        for k in range((2 + PHASES) * n):
            make_semaphore(first + k * _LINE, 0, 0)
        self._kept: Any = None
        weakref.finalize(self, _stop, threading.current_thread(), os.getpid(), self._shared, self._memory)
        for code in (_serve, _call, _join):
            _called(code)  # compiled here, and not by each of them
        memory = self._memory, self._shared  # and not this object, which ends when nobody has it any more
        for thread in range(1, n):
            given = memory, self.address, thread
            threading.Thread(target=_others, args=given, name=f"crew-{thread}", daemon=True).start()

    def wake(self) -> None:
        """Announce a job, so that the others are awake when it comes."""
        if self.n > 1:
            _called(_call)(self.address, 0)

    def begin(self, job: Callable[..., None], record: np.ndarray, kept: Any) -> None:
        """Take part in a job; when this thread has done its part, others may still be at theirs.

        Args:
            record: int64, what the job is given the address of.
            kept: what has the memory in it that the record names.
        """
        self.join()
        self._kept = record, kept
        self._shared[_JOB], self._shared[_RECORD] = compiled(job).address, address_of(record)
        _called(_call)(self.address, 1)

    def join(self) -> None:
        """Wait until the job that was begun is done by all."""
        if self.n > 1:
            _called(_join)(self.address, MOMENT)
        self._kept = None


def _stop(owner: threading.Thread, process: int, shared: np.ndarray, memory: np.ndarray) -> None:
    """End the others' threads."""
    if threading.get_ident() != owner.ident and owner.is_alive():
        return  # this process ends, and the owner may be at work with them
    if process == os.getpid():  # a forked process has none of them
        _called(_join)(address_of(shared), MOMENT)
        shared[_JOB] = 0
        _called(_call)(address_of(shared), 1)


def _others(memory: Any, address: int, thread: int) -> None:
    _called(_serve)(address, thread)
    del memory  # until now


_own = threading.local()


def crew_of(n: int) -> Crew:
    """The calling thread's own, of `n` threads; those of other sizes are done with what they had, and its memory."""
    crews: dict[int, Crew] = _own.__dict__.setdefault("crews", {})
    for size, other in crews.items():
        if size != n:
            other.join()
    if n not in crews:
        crews[n] = Crew(n)
    return crews[n]


def _forget() -> None:
    _own.__dict__.clear()


os.register_at_fork(after_in_child=_forget)
