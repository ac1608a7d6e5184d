"""The decoded cells of one window, and batches as views into them.

A superbatch has two large buffers. They go back to their pool when the last batch, or array, that looks into them is
dropped, so a batch that is kept stays right, and a loop that drops its batches reuses the same memory.
"""

import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np

from scarcade.dataloaders import kernels
from scarcade.dataloaders.reused import Lease, Lent

if TYPE_CHECKING:  # torch is two seconds at the start of every command that reads a store
    import torch
    from torch import Tensor

    from scarcade.dataloaders.on_gpu import OnGpu


class BufferPool:
    """Buffers of gene indices and values, lent and taken back. A fresh one costs its page faults.

    A pair comes back by itself when the last array that looks into it is gone, so whoever keeps a view keeps what is
    in it. Two streams of one source, each with its thread, may share a pool.
    """

    def __init__(self, index_dtype: np.dtype, value_dtype: np.dtype, *, pinned: bool = False) -> None:
        self._types = index_dtype, value_dtype
        self._pinned = pinned
        self._free: list[tuple[np.ndarray, np.ndarray]] = []
        self._lock = threading.RLock()  # a pair may be collected, and come back, while this thread lends

    def lend(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Two buffers of at least `n` entries."""
        pair = self._taken(n)
        lease = Lease()
        weakref.finalize(lease, self._give_back, pair).atexit = False
        return Lent(pair[0], lease).array(), Lent(pair[1], lease).array()

    def _taken(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            for k, pair in enumerate(self._free):
                if len(pair[0]) >= n:
                    return self._free.pop(k)
            self._free.clear()  # all too small: they would never be used again
        room = n + (n >> 3)
        if self._pinned:
            from scarcade.dataloaders.on_gpu import pinned

            return pinned(room, self._types[0]), pinned(room, self._types[1])
        return np.empty(room, self._types[0]), np.empty(room, self._types[1])

    def _give_back(self, pair: tuple[np.ndarray, np.ndarray]) -> None:
        with self._lock:
            self._free.append(pair)


class Kept:
    """Gene indices and values that window after window looks into, which a GPU may keep as well."""

    def __init__(self) -> None:
        self._there: list[Tensor] = []

    def on(self, indices: np.ndarray, data: np.ndarray, device: "torch.device") -> "list[Tensor]":
        """These, on `device`."""
        from scarcade.dataloaders.on_gpu import moved

        if not self._there or self._there[0].device != device:
            self._there = moved([indices, data], device)
        return self._there


class Superbatch:
    """Counts of the cells of a window: cell i has ``lengths[i]`` counts from ``starts[i]`` on.

    Args:
        in_order: the counts of cell i + 1 stand right behind those of cell i.
        kept: of the buffers, where they stay the same from one window to the next.
    """

    def __init__(
        self,
        indices: np.ndarray,
        data: np.ndarray,
        *,
        starts: np.ndarray,
        lengths: np.ndarray,
        rows: np.ndarray,
        in_order: bool = False,
        kept: Kept | None = None,
    ) -> None:
        self.indices, self.data = indices, data
        self.starts, self.lengths, self.rows = starts, lengths, rows
        self.in_order = in_order
        self._kept = kept
        self._there: OnGpu | None = None
        self._alone: OnGpu | None = None  # the same as `_there`, once they are not here any more

    @classmethod
    def on_gpu_alone(cls, there: "OnGpu", rows: np.ndarray) -> "Superbatch":
        """Cells that are in the memory of a GPU, and not here."""
        none = np.empty(0, np.int64)
        found = cls(none, none, starts=none, lengths=none, rows=rows)
        found._there = found._alone = there
        return found

    def of_cells(self, places: np.ndarray, kept: Kept | None = None) -> "Superbatch":
        """The cells at some places, as views."""
        if self._alone is not None:
            return Superbatch.on_gpu_alone(self._alone.of_cells(places), self.rows[places])
        cells = {"starts": self.starts[places], "lengths": self.lengths[places], "rows": self.rows[places]}
        return Superbatch(self.indices, self.data, **cells, kept=kept)

    def on(self, device: "torch.device") -> "OnGpu":
        """The same in the memory of a GPU, copied when it is first asked for."""
        from scarcade.dataloaders.on_gpu import OnGpu, moved

        if self._there is not None and self._there.data.device == device:
            return self._there
        if self._kept is not None:
            buffers = self._kept.on(self.indices, self.data, device)
            self._there = OnGpu(*buffers, *moved([self.starts, self.lengths], device))
            return self._there
        indptr, indices, data = self.csr(0, len(self.rows))
        lengths = np.diff(indptr).astype(np.int32)
        self._there = OnGpu(*moved([indices, data, indptr[:-1], lengths], device))
        return self._there

    def give_to(self, device: "torch.device") -> None:
        """Have them in the memory of a GPU alone; buffers that were lent go back at once, for the next window."""
        there = self.on(device)
        if self._kept is None:
            self._alone = there
            self.indices, self.data = self.indices[:0].copy(), self.data[:0].copy()

    def here(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, bool]:
        """(gene index, value, starts, lengths, whether they stand in order) of some cells in this machine's memory."""
        if self._alone is not None:
            indptr, indices, data = self.csr(start, stop)
            return indices, data, indptr[:-1], np.diff(indptr).astype(np.int32), True
        return self.indices, self.data, self.starts[start:stop], self.lengths[start:stop], self.in_order

    def csr(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indptr int64 (n + 1,), gene index, value) of some cells: views where the cells stand in order."""
        if self._alone is not None:
            return self._alone.fetched(start, stop)
        starts, lengths = self.starts[start:stop], self.lengths[start:stop]
        indptr = np.zeros(len(starts) + 1, np.int64)
        np.cumsum(lengths, out=indptr[1:])
        if self.in_order and len(starts):
            first = int(starts[0])
            end = first + int(indptr[-1])
            return indptr, self.indices[first:end], self.data[first:end]
        indices = np.empty(indptr[-1], self.indices.dtype)
        data = np.empty(indptr[-1], self.data.dtype)
        kernels.gather(self.indices, self.data, starts, lengths, indices, data)
        return indptr, indices, data


def renamed(loaded: Superbatch, places: np.ndarray, n_genes: int) -> Superbatch:
    """`loaded` with gene g as ``places[g]`` of `n_genes` (-1: left out); its buffers are changed where they are."""
    if np.iinfo(loaded.indices.dtype).max < n_genes:
        loaded = Superbatch(
            loaded.indices.astype(np.uint32),
            loaded.data.copy(),  # the buffers that were lent go back
            starts=loaded.starts,
            lengths=loaded.lengths,
            rows=loaded.rows,
        )
    kernels.rename(loaded.indices, loaded.data, loaded.starts, loaded.lengths, places)
    loaded.in_order = False  # what was left out has left gaps
    return loaded
