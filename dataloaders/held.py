"""Cells of a small split, decoded once and kept for the epochs that follow.

A split that is no more than one window would be decoded whole in every epoch, while nothing is there to train on. Kept
it takes the memory of the one window, where two are held while windows follow each other. Of several workers each keeps
all of it, if the memory that they are given holds it so often: what a worker reads is another part in each epoch.
"""

import threading

import numpy as np

from scarcade.dataloaders import kernels
from scarcade.dataloaders.sources import Runs, Source, positions_of
from scarcade.dataloaders.superbatch import Kept, Superbatch

_USED = 0.75  # of the memory that was lent, from which on the cells stay in it


class HeldSource:
    """The `n` cells of `source` from position `first` on, as `sources.Source`; positions are those of `source`.

    Raises:
        as `source`, when the cells are first asked for.
    """

    def __init__(self, source: Source, first: int, n: int) -> None:
        self.schema, self.columns = source.schema, source.columns
        self.n_cells, self.nnz = source.n_cells, source.nnz
        self.count_bytes = source.count_bytes
        self.least = 0  # nothing beside a cell must be decoded for it
        self._source, self._first = source, first
        self._all: Runs = [(first, first + n)]
        self._told = False
        self._held: Superbatch | None = None
        self._on_gpu = Kept()
        self._proteins: tuple[np.ndarray, np.ndarray] | None = None
        self._lock = threading.Lock()  # labelled cells may be asked for by a thread of their own

    @property
    def fingerprint(self) -> str:
        """That of the source."""
        return self._source.fingerprint

    def labels(self) -> np.ndarray | None:
        return self._source.labels()

    def batches(self) -> np.ndarray:
        return self._source.batches()

    def ahead(self, runs: Runs) -> None:
        """As the source does it, once for all of them."""
        with self._lock:
            if self._held is None and not self._told:
                self._source.ahead(self._all)
                self._told = True

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        """Views of what is kept."""
        return self._kept().of_cells(self._chosen(runs)[order], self._on_gpu)

    def proteins(self, superbatch: Superbatch, runs: Runs) -> tuple[np.ndarray, np.ndarray] | None:
        self._kept()
        if self._proteins is None:
            return None
        counts, measured = self._proteins
        chosen = self._chosen(runs)
        return counts[chosen], measured[chosen]

    def _chosen(self, runs: Runs) -> np.ndarray:
        """Where the cells of `runs` are among those that are kept."""
        return positions_of(runs) - self._first

    def _kept(self) -> Superbatch:
        with self._lock:
            if self._held is None:
                self._told = False  # should this fail
                loaded = self._source.load(self._all, np.arange(self._all[0][1] - self._first))
                self._proteins = self._source.proteins(loaded, self._all)
                self._held = _compact(loaded)
            return self._held


def _compact(loaded: Superbatch) -> Superbatch:
    """The same in as much memory as it needs, if it lies in much more: genes that a model has not were left out."""
    total = int(loaded.lengths.sum())
    if total >= len(loaded.indices) * _USED:
        return loaded
    indices, data = np.empty(total, loaded.indices.dtype), np.empty(total, loaded.data.dtype)
    kernels.gather(loaded.indices, loaded.data, loaded.starts, loaded.lengths, indices, data)
    starts = np.cumsum(loaded.lengths, dtype=np.int64) - loaded.lengths
    return Superbatch(indices, data, starts=starts, lengths=loaded.lengths, rows=loaded.rows)
