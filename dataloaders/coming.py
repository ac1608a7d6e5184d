"""Ranges of far files that were asked for ahead, and are on their way while others are read."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

_KEPT_TURNS = 3  # windows for which a range that nobody reads is kept: two may be in the making beside one that is told


@dataclass
class _Range:
    start: int
    stop: int
    turn: int
    bytes: "Future[bytes]"
    unread: int


class Coming:
    """What is on its way, by file. Readers need not ask for the ranges that were told: any part of them is taken.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._ranges: dict[str, list[_Range]] = {}
        self._turn = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._ranges.values()))

    def next_turn(self) -> None:
        """What is told from now on belongs to the next window; what nobody read for three of them is forgotten."""
        with self._lock:
            self._turn += 1
            for name, ranges in list(self._ranges.items()):
                self._ranges[name] = [one for one in ranges if one.turn > self._turn - _KEPT_TURNS]
                if not self._ranges[name]:
                    del self._ranges[name]

    def tell(self, name: str, offset: int, n_bytes: int, fetch: Callable[[], "Future[bytes]"]) -> None:
        """`fetch` these bytes, unless a range that was told has all of them."""
        stop = offset + n_bytes
        with self._lock:
            ranges = self._ranges.setdefault(name, [])
            if not any(one.start <= offset and stop <= one.stop for one in ranges):
                ranges.append(_Range(offset, stop, self._turn, fetch(), n_bytes))

    def take(self, name: str, offset: int, out: memoryview) -> list[tuple[int, int]]:
        """Fill `out` with what is on its way of the bytes from `offset` on; the parts (start, stop) of `out` left.

        Raises:
            what fetching a part of it raised, which is forgotten: the next reader asks anew.
        """
        at, end, gaps = offset, offset + len(out), []
        for one in self._touching(name, offset, end):
            start, stop = max(one.start, at), min(one.stop, end)
            if start >= stop:
                continue  # another range had it
            if at < start:
                gaps.append((at - offset, start - offset))
            try:
                found = memoryview(one.bytes.result())
                out[start - offset : stop - offset] = found[start - one.start : stop - one.start]
            except BaseException:
                self._read(name, one, one.unread)
                raise
            self._read(name, one, stop - start)
            at = stop
        if at < end:
            gaps.append((at - offset, end - offset))
        return gaps

    def _touching(self, name: str, start: int, stop: int) -> list[_Range]:
        with self._lock:
            found = [one for one in self._ranges.get(name, ()) if one.start < stop and start < one.stop]
        return sorted(found, key=lambda one: one.start)

    def _read(self, name: str, one: _Range, n_bytes: int) -> None:
        """Those were taken; a range of which all were taken is let go."""
        with self._lock:
            one.unread -= n_bytes
            ranges = self._ranges.get(name, [])
            if one.unread <= 0 and one in ranges:
                ranges.remove(one)
                if not ranges:
                    del self._ranges[name]
