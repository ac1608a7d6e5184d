"""Cells of a small split, decoded once and kept for the epochs that follow.

A split that is no more than one window would be decoded whole in every epoch, while nothing is there to train on. Kept
it takes the memory of the one window, where two are held while windows follow each other.
"""

import threading

import numpy as np

from scarcade.dataloaders.sources import Runs, Source
from scarcade.dataloaders.superbatch import Superbatch


class HeldSource:
    """The `n` cells of `source` from position `first` on, as `sources.Source`; positions are those of `source`.

    Raises:
        as `source`, when the cells are first asked for.
    """

    def __init__(self, source: Source, first: int, n: int) -> None:
        self.schema, self.columns = source.schema, source.columns
        self.n_cells, self.nnz = source.n_cells, source.nnz
        self.least = 0  # nothing beside a cell must be decoded for it
        self._source, self._first = source, first
        self._all: Runs = [(first, first + n)]
        self._places = np.arange(n)
        self._held: Superbatch | None = None
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
        if self._held is None:
            self._source.ahead(self._all)

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        """Views of what is kept."""
        have, chosen = self._kept(), self._chosen(runs)[order]
        return Superbatch(
            have.indices, have.data, starts=have.starts[chosen], lengths=have.lengths[chosen], rows=have.rows[chosen]
        )

    def proteins(self, superbatch: Superbatch, runs: Runs) -> tuple[np.ndarray, np.ndarray] | None:
        self._kept()
        if self._proteins is None:
            return None
        counts, measured = self._proteins
        chosen = self._chosen(runs)
        return counts[chosen], measured[chosen]

    def _chosen(self, runs: Runs) -> np.ndarray:
        """Where the cells of `runs` are among those that are kept."""
        return np.concatenate([self._places[start - self._first : stop - self._first] for start, stop in runs])

    def _kept(self) -> Superbatch:
        with self._lock:
            if self._held is None:
                loaded = self._source.load(self._all, self._places)
                self._proteins = self._source.proteins(loaded, self._all)
                self._held = loaded
            return self._held
