"""Sums over the workers of one machine, through memory that they share.

A sum over sockets costs a worker three copies through the kernel and a thread that takes the core from its training;
here each worker writes its numbers where all can read them, adds up its share of them, and reads the shares of the
others. Each number is added in the order of the ranks, so a sum has the same bits on every worker and in every run.

The memory has no name: the first worker makes it, and the others open it by the handle that it has there. It goes when
the last of them does, however they end. Whoever waits for a worker looks whether that one still lives.
"""

import contextlib
import mmap
import os
import secrets
import time
import weakref
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scarcade.engine import shared_flags as flags

if TYPE_CHECKING:
    from scarcade.engine.world import World

MOST = 1 << 30  # bytes that the workers of a machine may share
_LOOKS = 2_000  # some microseconds; then whoever else wants the core has it for a while
_AWAKE_S = 2e-3  # how long a worker that waits asks for the core again; then it sleeps between two looks
_SLEEP_S = (100e-6, 10e-3)  # at first; in the end, after a second
_ALIVE_S = 0.2  # how often it is looked whether the others live
_PATIENCE_S = 600.0  # as long as a sum over sockets waits for a worker that lives and does nothing
_ALIGNED = 64  # bytes at which a buffer begins
_TOKEN = 32  # bytes by which the memory is known for what it is

_open: "weakref.WeakSet[SharedSums]" = weakref.WeakSet()


class SharedSums:
    """Buffers of numbers that workers sum, step by step.

    There are two sets of buffers, used in turn: a worker that is ahead writes into one while others read the other.

    Attributes:
        close: those who wait for this worker wait no longer.
    """

    TURNS = 2

    def __init__(self, memory: mmap.mmap, pids: Sequence[int], rank: int, parts: Sequence[tuple[int, torch.dtype]]):
        self._pids, self._rank, self._size = pids, rank, len(pids)
        n_flags = _n_flags(len(parts), self._size)
        # of each part: how far each worker has written it, then how far each has added up its share; last: who left
        self._flags = np.frombuffer(memory, np.int64, n_flags * flags.LINE, offset=_TOKEN)
        self._left = n_flags - self._size
        self._all = [
            [[_tensor(memory, at, n, kind) for at, n, kind in of_rank] for of_rank in of_turn]
            for of_turn in _places(parts, self._size)[0]
        ]
        self._step = 1
        # also where nobody closes it: it must not hold the others up
        self.close = weakref.finalize(self, flags.tell, self._flags, self._left + rank, 1)
        self.close.atexit = False  # then the process is gone, which they see
        _open.add(self)

    @classmethod
    def among(cls, world: "World", parts: Sequence[tuple[int, torch.dtype]]) -> "SharedSums | None":
        """For the workers of `world`, who all call this; None if they do not share a machine, or so much memory.

        Args:
            parts: how many numbers each buffer has, and of which kind.
        """
        _, total = _places(parts, world.size)
        if world.size == 1 or world.device.type != "cpu" or not hasattr(os, "memfd_create") or total > MOST:
            return None
        memory, said = _made(total) if world.first else (None, {})
        said = world.say(said)
        if memory is None:
            memory = _opened(said, total)
        pids = world.sizes(os.getpid())
        sound = memory is not None and all(_lives(pid) for pid in pids)
        agreed = world.sizes(int(sound))
        if "handle" in said and world.first:
            os.close(said["handle"])
        return cls(memory, pids, world.rank, parts) if all(agreed) and memory is not None else None

    @property
    def turn(self) -> int:
        """Which of the two sets is written to in this step."""
        return self._step % self.TURNS

    def buffers(self, turn: int) -> list[Tensor]:
        """What this worker writes to."""
        return self._all[turn][self._rank]

    def send(self, number: int) -> None:
        """This worker's numbers are in the buffer."""
        flags.tell(self._flags, self._place(number, 0) + self._rank, self._step)

    def finish(self, number: int, out: Tensor) -> None:
        """Wait for those of the others, and write the sum to `out`.

        Raises:
            RuntimeError: a worker is gone.
        """
        parts = [of_rank[number] for of_rank in self._all[self.turn]]
        n = len(out)
        cuts = [min(n, -(-n * r // self._size // 16) * 16) for r in range(self._size)] + [n]
        own = slice(cuts[self._rank], cuts[self._rank + 1])
        self._wait(self._place(number, 0))
        torch.add(parts[0][own], parts[1][own], out=out[own])
        for part in parts[2:]:
            out[own] += part[own]
        parts[self._rank][own] = out[own]
        flags.tell(self._flags, self._place(number, 1) + self._rank, self._step)
        self._wait(self._place(number, 1))
        for rank, (start, stop) in enumerate(pairwise(cuts)):
            if rank != self._rank:
                out[start:stop] = parts[rank][start:stop]

    def next_step(self) -> None:
        """All sums of this step are finished."""
        self._step += 1

    def _place(self, number: int, phase: int) -> int:
        return (2 * number + phase) * self._size

    def _wait(self, first: int) -> None:
        place = flags.late(self._flags, first, self._size, self._step, _LOOKS)
        if place < 0:
            return
        before = looked = time.monotonic()
        waited_s = 0.0
        while place >= 0:
            now = time.monotonic()
            waited_s += min(now - before, _ALIVE_S)  # a process that is stopped does not wait
            before = now
            if waited_s < _AWAKE_S:
                os.sched_yield()
            else:
                least_s, most_s = _SLEEP_S
                time.sleep(min(max(least_s, waited_s / 100), most_s))
            rank = place - first
            gone = flags.late(self._flags, self._left + rank, 1, 1, 1) < 0
            if now - looked > _ALIVE_S:
                gone, looked = gone or not _lives(self._pids[rank]), now
            place = flags.late(self._flags, first, self._size, self._step, _LOOKS)  # one may come before it leaves
            if place >= 0 and (gone or waited_s > _PATIENCE_S):
                why = "is gone" if gone else f"has not answered for {_PATIENCE_S:.0f} s"
                raise RuntimeError(f"worker {rank} {why}, and its gradients are waited for")


def leave() -> None:
    """This process goes away in the middle of things: whoever waits for it fails instead of waiting."""
    for sums in list(_open):
        sums.close()


def _n_flags(n_parts: int, size: int) -> int:
    return (2 * n_parts + 1) * size


def _places(
    parts: Sequence[tuple[int, torch.dtype]], size: int
) -> tuple[list[list[list[tuple[int, int, torch.dtype]]]], int]:
    """Where each buffer begins, with its numbers and their kind, by turn and rank; and where the last one ends."""
    at = _TOKEN + 8 * flags.LINE * _n_flags(len(parts), size)
    found: list[list[list[tuple[int, int, torch.dtype]]]] = [[[] for _ in range(size)] for _ in range(SharedSums.TURNS)]
    for of_rank in (one for of_turn in found for one in of_turn):
        for n, kind in parts:
            at = -(-at // _ALIGNED) * _ALIGNED
            of_rank.append((at, n, kind))
            at += n * kind.itemsize
    return found, at


def _tensor(memory: mmap.mmap, at: int, n: int, kind: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=kind, count=n, offset=at) if n else torch.empty(0, dtype=kind)


def _made(total: int) -> tuple[mmap.mmap | None, dict[str, int | str]]:
    """Memory without a name, and what others need to open it; none if there is not so much."""
    handle = -1
    try:
        handle = os.memfd_create("scarcade-sums")  # which a sandbox may forbid
        os.posix_fallocate(handle, 0, total)
        memory = mmap.mmap(handle, total)
    except OSError:
        if handle >= 0:
            os.close(handle)
        return None, {}
    token = secrets.token_hex(_TOKEN // 2)
    memory[:_TOKEN] = token.encode()
    return memory, {"pid": os.getpid(), "handle": handle, "token": token}


def _opened(said: dict[str, int | str], total: int) -> mmap.mmap | None:
    """The memory that another process made; None if it is not of this machine."""
    if "handle" not in said:
        return None
    try:
        handle = os.open(f"/proc/{said['pid']}/fd/{said['handle']}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(handle).st_size != total:
            return None
        memory = mmap.mmap(handle, total)
    except OSError:
        return None
    finally:
        os.close(handle)
    return memory if memory[:_TOKEN] == str(said["token"]).encode() else None


def _lives(pid: int) -> bool:
    """Whether there is such a process, and it is not dead and only waiting to be buried."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False
