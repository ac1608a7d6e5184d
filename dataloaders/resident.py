"""Counts of a split that stay in the memory of a GPU, from the epoch that first read them on.

As they lie in a store, three or four bytes each, the counts of ten million cells and two thousand genes take a tenth of
a large GPU. So what an epoch has read once need not be read, decoded and brought again: a window is then the places of
its cells, and a GPU never waits for its data. Nothing is read for this alone: cells are brought by the windows that
want them, so of several workers each comes to hold those it has trained on.

The batches are those of a loader that keeps nothing, to the bit.
"""

import threading
from collections.abc import Sequence
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from scarcade.dataloaders.on_gpu import OnGpu, chosen, copied, settled
from scarcade.dataloaders.sources import Runs, Source, positions_of
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.superbatch import Superbatch

_SHARE = 4  # of the memory of a GPU that is free, the part that counts may take if nobody says how much
_PER_CELL = 12  # bytes for where a cell's counts begin, and how many there are


def room_on(device: torch.device, given: int | None) -> int:
    """Bytes of `device` for counts that stay there: as many as were `given`, or a share of what is free.

    Those of other splits of this process, which may not have come yet, are not free.
    """
    if device.type != "cuda":
        return 0
    others = [one for one in _there if one.device == device]
    free = torch.cuda.mem_get_info(device)[0] - sum(one.bytes for one in others if not one.has_room)
    return int(free // _SHARE if given is None else min(given - sum(one.bytes for one in others), free))


_there: "WeakSet[Resident]" = WeakSet()


class Resident:
    """The cells of `source` at [first, stop), whose rows are those of `store`, once they were read.

    Safe to use from several threads.
    """

    def __init__(self, source: Source, store: Store, first: int, stop: int, device: torch.device) -> None:
        self._source, self._store, self._first, self.device = source, store, first, device
        self.bytes = self.bytes_for(store, first, stop, source.count_bytes)
        _there.add(self)
        self._begin = store.start_of(first)
        self._here = np.zeros(stop - first, bool)  # cells that are there
        self._complete = False
        self._lengths = torch.from_numpy(store.lengths[first:stop].astype(np.int32)).to(device)
        self._starts = self._lengths.cumsum(0, dtype=torch.int64) - self._lengths
        settled(device)
        self._counts: tuple[Tensor, Tensor] | None = None  # made when it is known of which kind they are
        self._lock = threading.Lock()

    @property
    def has_room(self) -> bool:
        """Whether the memory for its counts is taken."""
        return self._counts is not None

    @staticmethod
    def bytes_for(store: Store, first: int, stop: int, count_bytes: int) -> int:
        """What a split takes."""
        return (store.start_of(stop) - store.start_of(first)) * count_bytes + (stop - first) * _PER_CELL

    def ahead(self, runs: Runs) -> None:
        """As the source does it, of what is not there."""
        self._source.ahead(self._missing(runs))

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        """As `sources.Source.load`; what is not there yet is read and brought."""
        return self.at(positions_of(runs)[order], runs)

    def at(self, rows: np.ndarray, spans: Runs) -> Superbatch:
        """The cells at some positions, in that order, which lie in some ranges; those that are missing come whole."""
        missing = self._missing(spans)
        if missing or self._counts is None:
            self._bring(missing)
        assert self._counts is not None
        starts, lengths = chosen((self._starts, self._lengths), rows - self._first)
        return Superbatch.on_gpu_alone(OnGpu(*self._counts, starts, lengths), rows)

    def _missing(self, runs: Runs) -> list[tuple[int, int]]:
        """The parts of `runs` that were not read yet."""
        if self._complete:
            return []
        parts: list[tuple[int, int]] = []
        for start, stop in runs:
            lacking = ~self._here[start - self._first : stop - self._first]
            edges = np.flatnonzero(np.diff(lacking, prepend=False, append=False)) + start
            parts += zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        return parts

    def _bring(self, runs: Sequence[tuple[int, int]]) -> None:
        """Read these and put them where they belong."""
        cells = np.cumsum([0, *(stop - start for start, stop in runs)]).tolist()
        loaded = self._source.load(runs, np.arange(cells[-1]))
        indices, data = self._made(loaded)
        pairs: list[tuple[np.ndarray, Tensor]] = []
        for (start, stop), first, last in zip(runs, cells, cells[1:], strict=False):
            to, end = self._store.start_of(start) - self._begin, self._store.start_of(stop) - self._begin
            at = int(loaded.starts[first])
            # as they were read, with the gaps of genes that a model does not have
            pairs.append((loaded.indices[at : at + end - to], indices[to:end]))
            pairs.append((loaded.data[at : at + end - to], data[to:end]))
            if not loaded.in_order:
                pairs.append((loaded.lengths[first:last], self._lengths[start - self._first : stop - self._first]))
        copied(pairs, self.device)
        with self._lock:
            for start, stop in runs:
                self._here[start - self._first : stop - self._first] = True
            self._complete = bool(self._here.all())

    def _made(self, like: Superbatch) -> tuple[Tensor, Tensor]:
        """Where the counts of all cells will be."""
        with self._lock:
            if self._counts is None:
                total = self._store.start_of(self._first + len(self._here)) - self._begin
                kinds = (torch.from_numpy(one[:0]).dtype for one in (like.indices, like.data))
                indices, data = (torch.empty(total, dtype=kind, device=self.device) for kind in kinds)
                self._counts = indices, data
                settled(self.device)  # whoever had this memory before may still be at work in it
            return self._counts
