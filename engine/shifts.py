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
from scarcade.engine.cluster import HEAD_AWAY_S, check_alive
from scarcade.engine.errors import ClusterError
from scarcade.engine.failures import explained, not_given, reason_of
from scarcade.engine.interrupts import Interrupts
from scarcade.engine.nodes import Seats, leaving, lost_of, unwanted
from scarcade.engine.scale import Scale

_SETTLE_S = 2.0  # how long the number of workers that there is room for must last before a group begins with it
_LASTING_S = 5.0  # how long room for more must last before a group that is at work stops for it
_TOLD_S = 5.0  # how long one waits without a word
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
        before, why = 0, ""
        while True:
            size, avoid = self._room(why)
            if before:
                self._tell_of(before, size, why)
            attended = self.begin(size, avoid)
            before = size
            with _Watch(self, size) as watch:
                returned = attended.result(self.tell, self.interrupts, watch)
            committed = attended.step is not None and attended.step != self._step
            self._step = attended.step if attended.step is not None else self._step
            if attended.error is not None:
                why = self._counted(attended, attended.error, committed=committed)
            elif attended.regrouped:
                why = f"node {watch.leaving} is to leave" if watch.leaving else ""
            else:
                return returned

    def _counted(self, attended: Attended, error: Exception, *, committed: bool) -> str:
        """Why a group ended in an `error`.

        Raises:
            ClusterError: it was once too often.
        """
        check_alive(patience_s=HEAD_AWAY_S)
        gone = lost_of(attended.nodes)
        # Losing nodes is nobody's fault. But without progress in between, the work may be what brings them down.
        if not (gone and committed):
            self._failures += 1
        if 0 <= self.scale.max_failures < self._failures:
            raise explained(error, self.scale, self.needed["CPU"]) from error
        return f"node {gone} is lost" if gone else f"a worker was lost ({reason_of(error)})"

    def _tell_of(self, before: int, size: int, why: str) -> None:
        """What becomes of the training, in one sentence."""
        since = f"step {self._step}" if self._step is not None else "the last checkpoint"
        wanted = self.scale.workers
        of = f" of {wanted}" if size < wanted else ""
        if why:
            self.tell({"warning": f"{why}: going on with {size}{of} workers from {since}"})
        elif size > before:
            self.tell({"note": f"{size}{of} workers again, from {since}"})
        else:
            self.tell({"note": f"going on with {size}{of} workers from {since}"})

    def _room(self, why: str) -> tuple[int, frozenset[str]]:
        """How many workers there is room for, and on which nodes there is none.

        All that are wanted, as soon as that many fit; fewer, down to the fewest allowed, once that has lasted.

        Raises:
            ClusterError: fewer than that for `scale.start_seconds`.
        """
        wanted = self.scale.workers
        fewest = self.scale.min_workers or wanted
        avoid = frozenset(unwanted())
        seats = Seats(self.needed, wanted, avoid)
        began, told = time.monotonic(), not why
        best, since = 0, began
        try:
            while True:
                self.interrupts.pass_on()
                check_alive(patience_s=HEAD_AWAY_S)
                now = time.monotonic()
                if (taken := seats.taken()) != best:
                    best, since = taken, now
                if taken >= wanted or (taken >= fewest and now - since > _SETTLE_S):
                    return taken, avoid
                if not told and taken < fewest and now - began > _TOLD_S:
                    told = True
                    self.tell({"warning": f"{why}: waiting for room for {fewest} workers"})
                if now - began > self.scale.start_seconds:
                    raise ClusterError(not_given(self.scale, self.needed["CPU"], why=why))
                time.sleep(_POLL_S)
        finally:
            seats.release()


class _Watch:
    """Whether a group should stop for another: there is room for more workers, or one of its nodes is to go."""

    def __init__(self, shifts: Shifts, size: int) -> None:
        self._needed, self._missing = shifts.needed, shifts.scale.workers - size
        self._seats: Seats | None = None
        self._taken, self._since = 0, 0.0
        self.leaving = ""  # nodes that were announced to go

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *_: object) -> None:
        if self._seats is not None:
            self._seats.release()

    def __call__(self, attended: Attended) -> bool:
        if not attended.has_begun:
            return False
        self.leaving = leaving(attended.nodes)
        if self.leaving:
            return True
        if not self._missing:
            return False
        # only now: earlier they would take the room that the group itself needs
        self._seats = self._seats or Seats(self._needed, self._missing, unwanted())
        now = time.monotonic()
        if (taken := self._seats.taken()) != self._taken:
            self._taken, self._since = taken, now
        return taken > 0 and now - self._since > _LASTING_S
