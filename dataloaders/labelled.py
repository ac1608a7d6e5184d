"""Labelled cells beside all cells: a second stream over a subset of rows, out of core.

Each batch of the main stream carries a batch of labelled cells. They are dealt by a plan of their own over the
sorted rows that have a label, pass after pass, each in another order; or over `samples_per_label` cells of each
class, drawn anew for each epoch. So the labelled cells of a step are a function of (seed, epoch, step), for any
number of workers, and nothing but the position is needed to resume.
"""

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from scarcade.dataloaders import kernels
from scarcade.dataloaders.loader import CellLoader, LoaderConfig
from scarcade.dataloaders.plan import Plan, permutation
from scarcade.dataloaders.resident import Resident
from scarcade.dataloaders.sources import Runs, Source, positions_of
from scarcade.dataloaders.superbatch import Kept, Superbatch
from scarcade.engine.contracts import Batch, Loader
from scarcade.engine.schema import UNLABELLED, Schema

_LABELLED = 0x6C6162  # a seed word that keeps the order of labelled cells apart from that of all cells
_PIECE = 8 << 20  # bytes decoded at once, about, while the cells of a window are picked out
_BYTES = 8  # of a decoded count, at most


class SubsetSource:
    """The cells of `source` at the ascending `positions`, which may repeat. What else is decoded is dropped at once.

    With `hold` they are read once and kept: for a subset as small as a window that would be read in every pass. Of
    cells that are `resident` on a GPU they are views.
    """

    def __init__(self, source: Source, positions: np.ndarray, *, hold: bool, resident: Resident | None = None) -> None:
        self.schema, self.columns, self.n_cells = source.schema, source.columns, len(positions)
        self.nnz = source.nnz * len(positions) // max(1, source.n_cells)
        self.least, self.count_bytes = 0, source.count_bytes
        self._source, self._positions, self._hold = source, positions, hold
        self._resident = resident
        self._held: Superbatch | None = None
        self._on_gpu = Kept()
        # cells that a chunk holds: what lies between two wanted cells of one chunk costs nothing more
        self._gap = source.least * source.n_cells // max(1, source.nnz)
        per_cell = _BYTES * max(1, source.nnz // max(1, source.n_cells))
        self._at_once = max(1, _PIECE // per_cell)  # cells

    @cached_property
    def fingerprint(self) -> str:
        """Of the source and of which of its cells are taken."""
        return f"{self._source.fingerprint} {hashlib.sha256(self._positions.tobytes()).hexdigest()}"

    def ahead(self, runs: Runs) -> None:
        """As the source does it, for the pieces that `load` will read."""
        if self._resident is not None:
            self._resident.ahead(_spans(self._cells(runs)[0], self._gap)[0])
            return
        if self._held is not None:
            return
        if not self._source.least:  # whatever the ranges: it has its cells, or has all of them come
            self._source.ahead([])
            return
        wanted = self._positions if self._hold else self._cells(runs)[0]
        self._source.ahead([span for spans, _ in self._pieces(wanted) for span in spans])

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        """The cells of some ranges of places in `positions`, put into `order`."""
        if self._resident is not None:
            cells, back = self._cells(runs)
            return self._resident.at(cells[back[order]], _spans(cells, self._gap)[0])
        places = positions_of(runs)
        if self._hold and self._held is None:
            self._held = self._read(self._positions)
        if self._held is not None:
            return self._held.of_cells(places[order], self._on_gpu)
        cells, back = self._cells(runs)
        return self._read(cells).of_cells(back[order])

    def labels(self) -> np.ndarray | None:
        codes = self._source.labels()
        return None if codes is None else codes[self._positions]

    def batches(self) -> np.ndarray:
        codes: np.ndarray = self._source.batches()[self._positions]
        return codes

    def proteins(self, superbatch: Superbatch, runs: Runs) -> tuple[np.ndarray, np.ndarray] | None:
        """None: classifiers see counts alone."""
        return None

    def _cells(self, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
        """The positions at some ranges of places, each once and ascending, and where each place's is among them."""
        wanted = self._positions[positions_of(runs)].astype(np.int64)
        return np.unique(wanted, return_inverse=True)

    def _pieces(self, wanted: np.ndarray) -> Iterator[tuple[list[tuple[int, int]], np.ndarray]]:
        """What is read at once: ranges of the source, and where the wanted cells are among theirs."""
        # a cell with nothing near it costs as much as those of a whole chunk
        decoded = np.cumsum(np.minimum(np.diff(wanted, prepend=wanted[:1] - 1), self._gap + 1))
        for part in np.split(wanted, np.flatnonzero(np.diff(decoded // self._at_once)) + 1):
            yield _spans(part, self._gap)

    def _read(self, wanted: np.ndarray) -> Superbatch:
        if not self._source.least:  # nothing is decoded: views
            return self._source.load(*_spans(wanted, 0))
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        for spans, places in self._pieces(wanted):
            loaded = self._source.load(spans, np.arange(sum(stop - start for start, stop in spans)))
            lengths = loaded.lengths[places]
            total = int(lengths.sum())
            indices, data = np.empty(total, loaded.indices.dtype), np.empty(total, loaded.data.dtype)
            kernels.gather(loaded.indices, loaded.data, loaded.starts[places], lengths, indices, data)
            parts.append((indices, data, lengths, loaded.rows[places]))
            del loaded  # its buffers go back before the next piece asks for some
        indices, data, lengths, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
        starts = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], out=starts[1:])
        return Superbatch(indices, data, starts=starts, lengths=lengths, rows=rows)


def _spans(wanted: np.ndarray, gap: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Ranges that hold all `wanted` positions, over gaps of up to `gap`, and the place of each among their cells."""
    if not len(wanted):  # of few cells a worker may have none
        return [], np.zeros(0, np.int64)
    steps = np.diff(wanted)
    cuts = np.flatnonzero((steps < 1) | (steps > gap + 1)) + 1
    first = np.concatenate([[0], cuts])
    begins, ends = wanted[first], wanted[np.concatenate([cuts, [len(wanted)]]) - 1] + 1
    before = np.concatenate([[0], np.cumsum(ends - begins)[:-1]])
    places = np.repeat(before - begins, np.diff(np.concatenate([first, [len(wanted)]]))) + wanted
    return list(zip(begins.tolist(), ends.tolist(), strict=True)), places


def with_labelled(main: CellLoader, config: LoaderConfig, *, seed: int, left_out: np.ndarray | None = None) -> Loader:
    """The batches of `main`, each with labelled cells of the same split beside it (`Batch.labelled`).

    Without any labelled cell in the split it is `main` itself. What `config` says of memory holds for all cells; a
    quarter of it is for the labelled ones besides. The cells of the source at `left_out`, bool (n,), are not taken.
    """
    codes = main.source.labels()
    if codes is None:
        return main
    if left_out is not None:
        codes = np.where(left_out, UNLABELLED, codes)
    codes = codes[main.first : main.first + main.n_cells]
    places = np.flatnonzero(codes != UNLABELLED)
    return WithLabelled(main, main.first + places, codes[places], config, seed=seed) if len(places) else main


class WithLabelled:
    """See `with_labelled`; `positions` are those of the labelled cells in the source, ascending."""

    def __init__(
        self, main: CellLoader, positions: np.ndarray, codes: np.ndarray, config: LoaderConfig, *, seed: int
    ) -> None:
        self.schema: Schema = main.schema
        self._main, self._positions, self._per_label = main, positions, config.samples_per_label
        self._classes = [positions[codes == code] for code in np.unique(codes)]
        self._seed = int(np.random.SeedSequence((seed, _LABELLED)).generate_state(1, np.uint64)[0])
        k, whole, source, memory = self._per_label, main.plan, main.source, config.memory // 4
        n = len(positions) if k is None else sum(min(k, len(one)) for one in self._classes)
        per_cell = max(1, _BYTES * source.nnz // source.n_cells)
        self._hold = main.resident is None and n * per_cell <= memory
        window = max(config.batch_size, min(config.window, memory // (2 * per_cell)))
        self.plan = Plan(n, whole.batch_size, whole.lanes, window, seed=self._seed, shuffle=whole.shuffle)
        self._passes = -(-main.steps_per_epoch // self.plan.steps)
        self._waited = 0.0
        self._loader: tuple[int, CellLoader] | None = None  # the epoch it is for, where that matters

    @property
    def n_cells(self) -> int:
        """Cells of this split, over all workers."""
        return self._main.n_cells

    @property
    def n_labelled(self) -> int:
        """Labelled cells of an epoch, over all workers."""
        return self.plan.n_cells

    @property
    def steps_per_epoch(self) -> int:
        """Those of all cells."""
        return self._main.steps_per_epoch

    @property
    def waited(self) -> float:
        """Seconds that the consumer has waited for data so far."""
        return self._main.waited + self._waited

    def fingerprint(self) -> str:
        """Of all cells: which have labels is a part of it."""
        return self._main.fingerprint()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As that of the main stream; a labelled cell may come in several steps of an epoch."""
        labelled = self._labelled(epoch, start)
        try:
            for batch in self._main.epoch(epoch, start):
                began = time.perf_counter()
                beside = next(labelled)
                self._waited += time.perf_counter() - began
                yield replace(batch, labelled=beside)
                del beside
        finally:
            labelled.close()

    def _labelled(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        loader = self._of(epoch)
        number, step = divmod(start, self.plan.steps)
        while True:
            yield from loader.epoch(epoch * self._passes + number, step)
            number, step = number + 1, 0

    def _of(self, epoch: int) -> CellLoader:
        """The loader of an epoch's labelled cells."""
        key = epoch if self._per_label is not None else 0
        if self._loader is None or self._loader[0] != key:
            main = self._main
            subset = SubsetSource(main.source, self._chosen(epoch), hold=self._hold, resident=main.resident)
            loader = CellLoader(subset, self.plan, 0, main.shard, read_ahead=not self._hold, device=main.device)
            self._loader = key, loader
        return self._loader[1]

    def _chosen(self, epoch: int) -> np.ndarray:
        if self._per_label is None:
            return self._positions
        parts: Sequence[np.ndarray] = [
            one[permutation(len(one), _state(self._seed, epoch, number))[: self._per_label]]
            for number, one in enumerate(self._classes)
        ]
        return np.sort(np.concatenate(parts))


def _state(*words: int) -> np.uint64:
    return np.uint64(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
