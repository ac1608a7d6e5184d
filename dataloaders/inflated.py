"""Gzipped arrays of HDF5, decompressed by us: HDF5's own gzip, on one thread, is most of what ingest has to do.

HDF5 hands out its chunks as they lie in the file. ISA-L inflates them faster than the zlib that HDF5 is built with,
and, since it lets go of the interpreter, on several threads at once. Arrays with other filters than gzip (with or
without shuffle), of other types, or whose chunks were never written are read by HDF5 as ever.
"""

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import h5py
import numpy as np

from scarcade.dataloaders.reused import empty
from scarcade.engine.cores import cores

try:
    from isal import isal_zlib as zlib
except ImportError:  # no build for this machine: the same calls, slower
    import zlib  # type: ignore[no-redef]

_Error: Any = zlib.error
_AT_ONCE = 1 << 20  # bytes that a thread unpacks before it asks for more: to ask costs as much as a small chunk
_MOST_THREADS = 8  # more would wait for the one that reads the file
_lock = threading.Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None  # of which process


def inflated(array: Any) -> Any:
    """`array` itself, or, if it is a list of numbers that HDF5 keeps gzipped, its `InflatedArray`."""
    shuffled = _shuffled(array) if isinstance(array, h5py.Dataset) else None
    return array if shuffled is None else InflatedArray(array, shuffled)


class InflatedArray:
    """A gzipped list of numbers (n,), read by slices."""

    def __init__(self, dataset: h5py.Dataset, shuffled: bool) -> None:
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype: np.dtype = dataset.dtype
        self.chunks: tuple[int, ...] = dataset.chunks
        self._dataset, self._shuffled = dataset, shuffled
        self._last: tuple[int, np.ndarray] | None = None  # the chunk in which the last slice ended

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Values [start, stop), freshly made.

        Raises:
            what h5py raises on damaged bytes.
        """
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise IndexError(f"{self._dataset.name}: slices have a step of 1")
        size = self.chunks[0]
        out = empty(max(0, stop - start), self.dtype)
        chunks = range(start // size, -(-stop // size)) if len(out) else range(0)
        kept, self._last = self._last, None
        if kept is not None and len(chunks) and kept[0] == chunks[0]:
            self._put(kept[0], kept[1], out, start)
            self._last = kept if len(chunks) == 1 else None
            chunks = chunks[1:]
        at_once = max(1, _AT_ONCE // (size * self.dtype.itemsize))
        waiting: list[Future[None]] = []
        for first in range(0, len(chunks), at_once):
            stored = [(number, self._stored(number)) for number in chunks[first : first + at_once]]
            waiting.append(_threads().submit(self._unpack, stored, out, start, chunks[-1]))
        for one in waiting:
            one.result()
        return out

    def _stored(self, number: int) -> tuple[int, bytes] | None:
        """(filters that were left out, bytes) of a chunk; None for one that was never written."""
        try:  # (asking first whether it is there walks through all chunks)
            found: tuple[int, bytes] = self._dataset.id.read_direct_chunk((number * self.chunks[0],))
        except (OSError, RuntimeError, ValueError):
            return None
        return found

    def _unpack(
        self, stored: list[tuple[int, tuple[int, bytes] | None]], out: np.ndarray, start: int, last: int
    ) -> None:
        """In a thread: the values of some chunks into their places."""
        for number, found in stored:
            values = None if found is None or found[0] else self._values(found[1])
            if values is None:  # HDF5 has the last word on what is odd, or damaged
                first = number * self.chunks[0]
                values = np.asarray(self._dataset[first : min(first + self.chunks[0], len(self))])
            self._put(number, values, out, start)
            if number == last:
                self._last = number, values

    def _values(self, packed: bytes) -> np.ndarray | None:
        """The values of a chunk, if it is gzip of as many as it should hold and its checksum is right."""
        n_bytes = self.chunks[0] * self.dtype.itemsize
        unpacker = zlib.decompressobj()
        try:
            raw = unpacker.decompress(packed, n_bytes + 1)  # no more, whatever it claims to hold
        except _Error:
            return None
        if len(raw) != n_bytes or not unpacker.eof:
            return None
        if self._shuffled:
            planes = np.frombuffer(raw, np.uint8).reshape(self.dtype.itemsize, self.chunks[0])
            return np.ascontiguousarray(planes.T).reshape(-1).view(self.dtype)
        return np.frombuffer(raw, self.dtype)

    def _put(self, number: int, values: np.ndarray, out: np.ndarray, start: int) -> None:
        first = number * self.chunks[0] - start  # in `out`
        low, high = max(first, 0), min(first + len(values), len(out))
        out[low:high] = values[low - first : high - first]


def _shuffled(dataset: h5py.Dataset) -> bool | None:
    """Whether shuffle came before gzip; None if something else was done, or if these are no plain numbers."""
    if len(dataset.shape or ()) != 1 or dataset.chunks is None or dataset.dtype.kind not in "iuf":
        return None
    if dataset.dtype.metadata or dataset.dtype.itemsize != dataset.id.get_type().get_size():
        return None
    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    known = {(h5py.h5z.FILTER_DEFLATE,): False, (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE): True}
    return known.get(tuple(filters))


def _threads() -> ThreadPoolExecutor:
    """As many as OpenMP may have (a task of Ray is given one), else one for each core."""
    global _pool  # noqa: PLW0603  one pool a process is the point
    with _lock:
        if _pool is None or _pool[0] != os.getpid():
            told = os.environ.get("OMP_NUM_THREADS", "")
            n = int(told) if told.isdigit() and int(told) else cores()
            _pool = os.getpid(), ThreadPoolExecutor(min(n, _MOST_THREADS), thread_name_prefix="scarcade-inflate")
        return _pool[1]
