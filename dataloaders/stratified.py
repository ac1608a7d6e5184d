"""Training cells so drawn that each batch (donor, study) is met equally often, out of core.

An epoch is as long as one over all cells, and every batch has the same share of it: a small batch comes several
times, of a large one a part comes, another one in the next epoch. A batch's cells are taken pass after pass, each in
an order of its own, so over the run every cell of it comes equally often, give or take one (scArches draws with
replacement). What is drawn is a function of (seed, epoch): the same on any number of workers and after a resume.
"""

from collections.abc import Iterator

import numpy as np

from scarcade.dataloaders.labelled import SubsetSource
from scarcade.dataloaders.loader import CellLoader
from scarcade.dataloaders.plan import permutation
from scarcade.dataloaders.resident import Resident
from scarcade.dataloaders.sources import Runs, Source
from scarcade.dataloaders.superbatch import Superbatch
from scarcade.engine.contracts import Batch

_STRATA = 0x737472  # a seed word that keeps these draws apart from the order of cells


class DrawnSource(SubsetSource):
    """The cells of `source` at the ascending `positions`, some of them several times, with their proteins."""

    def __init__(self, source: Source, positions: np.ndarray, resident: Resident | None = None) -> None:
        super().__init__(source, positions, hold=False, resident=resident)
        self._all = source

    def proteins(self, superbatch: Superbatch, runs: Runs) -> tuple[np.ndarray, np.ndarray] | None:
        cells, back = self._cells(runs)
        cuts = np.flatnonzero(np.diff(cells) > 1) + 1
        spans = [(int(part[0]), int(part[-1]) + 1) for part in np.split(cells, cuts)]
        both = self._all.proteins(superbatch, spans)
        return None if both is None else (both[0][back], both[1][back])


def stratified(main: CellLoader, *, seed: int) -> CellLoader:
    """`main`, with every batch met equally often; `main` itself where there is one batch alone."""
    codes = main.source.batches()[main.first : main.first + main.n_cells]
    kind = np.min_scalar_type(main.source.n_cells)  # of many cells, half the memory of int64
    strata = [(main.first + np.flatnonzero(codes == code)).astype(kind) for code in np.unique(codes)]
    return Stratified(main, strata, seed=seed) if len(strata) > 1 else main


class Stratified(CellLoader):
    """See `stratified`; `strata` are the positions of each batch's cells in the source, ascending."""

    def __init__(self, main: CellLoader, strata: list[np.ndarray], *, seed: int) -> None:
        super().__init__(
            main.source,
            main.plan,
            main.first,
            main.shard,
            read_ahead=main.read_ahead,
            device=main.device,
            resident=main.resident,
        )
        self._strata = strata
        self._words = int(np.random.SeedSequence((seed, _STRATA)).generate_state(1, np.uint64)[0])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on; not every cell comes in it, and some come more than once."""
        source = DrawnSource(self.source, self.drawn(epoch), self.resident)
        drawn = CellLoader(source, self.plan, 0, self.shard, read_ahead=self.read_ahead, device=self.device)
        waited = self._waited
        for batch in drawn.epoch(epoch, start):
            self._waited = waited + drawn.waited
            yield batch
            del batch

    def drawn(self, epoch: int) -> np.ndarray:
        """Positions of the epoch's cells (n_cells,), ascending, with repeats."""
        n, k = self.plan.n_cells, len(self._strata)
        shares = np.diff(np.arange(k + 1) * n // k)
        parts = [self._of(number, epoch, int(share)) for number, share in enumerate(shares)]
        return np.sort(np.concatenate(parts))

    def _of(self, number: int, epoch: int, share: int) -> np.ndarray:
        """The cells of a stratum that `epoch` takes: a stretch of its passes, one behind the other."""
        cells = self._strata[number]
        first, last = epoch * share, (epoch + 1) * share
        parts = []
        for one in range(first // len(cells), -(-last // len(cells))):
            words = np.random.SeedSequence((self._words, number, one)).generate_state(1, np.uint64)[0]
            order = permutation(len(cells), np.uint64(words))
            parts.append(cells[order[max(0, first - one * len(cells)) : last - one * len(cells)]])
        return np.concatenate(parts) if parts else cells[:0]
