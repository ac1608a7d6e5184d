"""One group of workers after another on a cluster whose nodes come and go, until the work is done.

Ray Train restarts workers by itself, and can resize a group of them. It then waits for a lost node for as long as a
start may take, asks for room on a node that is gone but not yet given up, and kills workers in the middle of things
when others join. So here each group has a fixed size, and this file decides what comes after it: as many workers as
there is room for, from the newest checkpoint. When there is room for more, the workers commit where they are first.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scarcade.engine.attended import Attended
from scarcade.engine.errors import ClusterError
from scarcade.engine.failures import explained, not_given
from scarcade.engine.interrupts import Interrupts
from scarcade.engine.nodes import Seats, leaving, lost_of, silent
from scarcade.engine.scale import Scale

_SETTLE_S = 5.0  # how long the number of workers that there is room for must last before it is taken
_POLL_S = 0.2

Tell = Callable[[Mapping[str, Any]], None]
Begin = Callable[[int, frozenset[str]], Attended]
"""A group of so many workers on none of these nodes."""


@dataclass
class Shifts:
    """The groups of one launch.

    Args:
        needed: resources of one worker, as Ray calls them.
        begin: makes a group of workers, ready to be attended.
    """

    scale: Scale
    needed: Mapping[str, float]
    begin: Begin
    tell: Tell
    interrupts: Interrupts
    _failures: int = field(default=0, init=False)
    _step: int | None = field(default=None, init=False)

    def result(self) -> dict[str, Any]:
        """What rank 0 of the last group returned.

        Raises:
            ClusterError: too few workers could be had, or they died too often.
        """
        before, lost = None, ""
        while True:
            size, avoid = self._room(lost)
            if before is not None:
                self._tell_of(before, size, lost)
            attended = self.begin(size, avoid)
            before = size
            with _Watch(self, size) as watch:
                returned = attended.result(self.tell, self.interrupts, watch)
            committed = attended.step is not None and attended.step != self._step
            self._step = attended.step if attended.step is not None else self._step
            if attended.error is None and not attended.regrouped:
                return returned
            lost = watch.going
            if attended.error is not None:
                lost = self._counted(attended, attended.error, committed=committed)

    def _counted(self, attended: Attended, error: Exception, *, committed: bool) -> str:
        """The addresses of the nodes that took workers along, or nothing if workers died by themselves.

        Raises:
            ClusterError: it was once too often.
        """
        gone = ", ".join(lost_of(attended.nodes))
        # Losing nodes is nobody's fault. But without progress in between, the work may be what brings them down.
        if not (gone and committed):
            self._failures += 1
        if 0 <= self.scale.max_failures < self._failures:
            raise explained(error, self.scale, self.needed["CPU"]) from error
        if not gone:
            self.tell({"warning": f"a worker was lost ({explained(error, self.scale, self.needed['CPU']).args[0]})"})
        return gone

    def _tell_of(self, before: int, size: int, lost: str) -> None:
        since = f"step {self._step}" if self._step is not None else "the last checkpoint"
        if size > before:
            self.tell(
                {
                    "note": f"{size} workers again, from {since}"
                    if size == self.scale.workers
                    else f"{size} workers of {self.scale.workers} now, from {since}"
                }
            )
        elif lost or size < before:
            what = f"node {lost} is lost" if lost else "there is less room in the cluster"
            of = f" of {self.scale.workers}" if size < self.scale.workers else ""
            self.tell({"warning": f"{what}: going on with {size}{of} workers from {since}"})
        else:
            self.tell({"note": f"going on with {size} workers from {since}"})

    def _room(self, lost: str) -> tuple[int, frozenset[str]]:
        """How many workers there is room for, and on which nodes there is none.

        All that are wanted, as soon as that many fit; fewer, down to the fewest allowed, once that has lasted.

        Raises:
            ClusterError: fewer than that for `scale.start_seconds`.
        """
        wanted = self.scale.workers
        fewest = self.scale.min_workers or wanted
        avoid = frozenset(silent())
        seats = Seats(self.needed, wanted, avoid)
        began, told = time.monotonic(), not lost
        best, since = 0, began
        try:
            while True:
                self.interrupts.pass_on()
                now = time.monotonic()
                if (taken := seats.taken()) != best:
                    best, since = taken, now
                if taken >= wanted or (taken >= fewest and now - since > _SETTLE_S):
                    return taken, avoid
                if not told and now - began > _SETTLE_S:
                    told = True
                    self.tell({"warning": f"node {lost} is lost: waiting for room for {fewest} workers"})
                if now - began > self.scale.start_seconds:
                    raise ClusterError(not_given(self.scale, self.needed["CPU"], lost=lost))
                time.sleep(_POLL_S)
        finally:
            seats.release()


class _Watch:
    """Whether a group should stop for another: there is room for more workers, or one of its nodes is to go."""

    def __init__(self, shifts: Shifts, size: int) -> None:
        self._needed, self._missing = shifts.needed, shifts.scale.workers - size
        self._seats: Seats | None = None
        self._taken, self._since = 0, 0.0
        self.going = ""  # nodes that were announced to go

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *_: object) -> None:
        if self._seats is not None:
            self._seats.release()

    def __call__(self, attended: Attended) -> bool:
        if not attended.has_begun:
            return False
        self.going = ", ".join(leaving(attended.nodes))
        if self.going:
            return True
        if not self._missing:
            return False
        # only now: earlier they would take the room that the group itself needs
        self._seats = self._seats or Seats(self._needed, self._missing)
        now = time.monotonic()
        if (taken := self._seats.taken()) != self._taken:
            self._taken, self._since = taken, now
        return taken > 0 and now - self._since > _SETTLE_S
