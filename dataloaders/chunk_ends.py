"""Decoded chunks at the ends of ranges: a window ends within a chunk, and the next window of its lane begins there."""

import threading
from collections import OrderedDict

import numpy as np

Chunk = tuple[np.ndarray, np.ndarray]  # gene indices and values

_KEPT = 64  # chunks of a quarter of a megabyte: a few for each lane


class ChunkEnds:
    """The chunks that were kept last, by number, and room for others. Several streams, each with a thread, share it."""

    def __init__(self, n: int, index_dtype: np.dtype, value_dtype: np.dtype, most: int = _KEPT) -> None:
        self._shape = n, index_dtype, value_dtype
        self._most = most
        self._kept: OrderedDict[int, Chunk] = OrderedDict()
        self._free: list[Chunk] = []
        self._lock = threading.Lock()

    def taken(self, number: int) -> Chunk | None:
        """That chunk, which is the caller's now, if it is here."""
        with self._lock:
            return self._kept.pop(number, None)

    def keep(self, number: int, chunk: Chunk) -> None:
        """The caller lets go of it. Of too many, the one that was kept for longest is forgotten."""
        with self._lock:
            if (same := self._kept.pop(number, None)) is not None:
                self._free.append(same)
            self._kept[number] = chunk
            if len(self._kept) > self._most:
                self._free.append(self._kept.popitem(last=False)[1])

    def free(self, chunk: Chunk) -> None:
        """The caller lets go of it, and nobody needs it."""
        with self._lock:
            self._free.append(chunk)

    def fresh(self) -> Chunk:
        """Room for a chunk, the caller's until it is kept."""
        with self._lock:
            if self._free:
                return self._free.pop()
        n, index_dtype, value_dtype = self._shape
        return np.empty(n, index_dtype), np.empty(n, value_dtype)
