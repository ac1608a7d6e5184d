"""`CellLoader`: the batches of one split with their position, from a source and a plan, read ahead.

A window of cells is decoded in a thread while the one before is consumed; batches are views into it. For a GPU two
windows are in the making at a time, and are copied there by whoever makes them.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scarcade.dataloaders.on_gpu import columns_on
from scarcade.dataloaders.packed import DenseRing, PackedCounts
from scarcade.dataloaders.plan import Plan, WindowPlan
from scarcade.dataloaders.prefetch import Prefetch, SideBySide
from scarcade.dataloaders.resident import Resident
from scarcade.dataloaders.sources import Source
from scarcade.dataloaders.superbatch import Superbatch
from scarcade.engine.contracts import Batch
from scarcade.engine.errors import UsageError
from scarcade.engine.schema import UNLABELLED, Position, Shard

Window = tuple[WindowPlan, Superbatch, dict[str, Tensor]]
CPU = torch.device("cpu")
_MAKERS = 2  # windows for a GPU that are made at a time: one is copied, or waits for its threads, beside the other


class CellLoader:
    """Batches of one split, for one worker (`scarcade.engine.contracts.Loader`).

    Their small tensors are on `device`, and their counts were copied there if it is a GPU.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        first: int,
        shard: Shard,
        *,
        read_ahead: bool = True,
        device: torch.device = CPU,
        resident: Resident | None = None,
    ) -> None:
        self.schema = source.schema
        self.plan = plan
        self.shard = shard
        self.source = source
        self.first = first
        self.read_ahead = read_ahead
        self.device = device
        self.resident = resident
        self._waited = 0.0
        self._making: SideBySide[Window] = SideBySide(_MAKERS if read_ahead and device.type != "cpu" else 1)
        self._rings: list[DenseRing] = []
        self._last = -2  # the epoch that was asked for last: none
        self._next: tuple[int, Iterator[Window], Prefetch[Window]] | None = None  # an epoch whose first window is begun

    @property
    def n_cells(self) -> int:
        """Cells of this split, over all workers."""
        return self.plan.n_cells

    @property
    def steps_per_epoch(self) -> int:
        """The same on every worker."""
        return self.plan.steps

    @property
    def waited(self) -> float:
        """Seconds that the consumer has waited for data so far."""
        return self._waited

    def fingerprint(self) -> str:
        """Of the cells and their order on disk, and of which of them are in this split."""
        what = f"{self.source.fingerprint} {self.first} {self.plan.n_cells}"
        return hashlib.sha256(what.encode()).hexdigest()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on; over all workers every cell of the split once.

        Raises:
            MissingChunkError, CorruptError, CsrError: when the cells that are wanted cannot be trusted.
        """
        if epoch < 0 or not 0 <= start <= self.plan.steps:
            raise UsageError(f"epoch {epoch}, step {start}: an epoch has steps 0 to {self.plan.steps}")
        if start == self.plan.steps:
            return
        ring = self._rings.pop() if self._rings else DenseRing()
        follows, self._last = epoch == self._last + 1, epoch
        windows, first = self._begun(epoch, start)
        prefetch: Prefetch[Window] | None = None
        try:
            for number in range(self.plan.window_of(start), self.plan.n_windows):
                if first is None and prefetch is None and self.read_ahead:
                    prefetch = Prefetch(windows, manual=True)
                began = time.perf_counter()
                window = next(first or prefetch or windows)
                self._waited += time.perf_counter() - began
                first = None
                batches = self._batches(*window, epoch=epoch, start=start, ring=ring)
                del window  # its batches alone decide how long it lives
                for k, batch in enumerate(batches):
                    if k == 1:
                        prefetch = self._go_on(windows, number, prefetch, epoch + 1 if follows else None)
                    yield batch
                    del batch
                if k == 0:
                    prefetch = self._go_on(windows, number, prefetch, epoch + 1 if follows else None)
        finally:
            if prefetch is not None:
                prefetch.close()
            self._rings.append(ring)

    def _go_on(
        self, windows: Iterator[Window], number: int, prefetch: Prefetch[Window] | None, after: int | None
    ) -> Prefetch[Window] | None:
        """Begin the next window: the consumer has let go of the one before window `number`, whose buffer is free.

        Behind the last one comes the first of the epoch `after`, where epochs have followed each other so far: its
        thread ends with it, so a loader that is forgotten then leaves nothing behind.
        """
        if not self.read_ahead:
            return None
        if number + 1 < self.plan.n_windows:
            if prefetch is None:
                return Prefetch(windows, manual=True)
            prefetch.proceed()
        elif after is not None and (number or self.resident is not None):
            coming = self._windows(after, 0, early=True)
            self._next = after, coming, Prefetch(islice(coming, 1), ahead=2)
        return prefetch

    def _begun(self, epoch: int, start: int) -> tuple[Iterator[Window], Prefetch[Window] | None]:
        """The windows of `epoch` from step `start` on; the first of them apart, if it was begun already."""
        begun, self._next = self._next, None
        if begun is not None and begun[0] == epoch and start == 0:
            return begun[1:]
        if begun is not None:
            begun[2].close()
        return self._windows(epoch, start), None

    def _windows(self, epoch: int, start: int, *, early: bool = False) -> Iterator[Window]:
        """`early`: much else may be read before the second of them is asked for."""
        return self._making.results(self._to_make(epoch, start, self._making.n if early else 0))

    def _to_make(self, epoch: int, start: int, early: int) -> Iterator[Callable[[], Window]]:
        """What makes the windows, one after the other; nothing is told ahead of the first `early` ones."""
        blocks = self.plan.blocks(epoch)
        planned = (
            self.plan.window_plan(epoch, number, self.shard, blocks)
            for number in range(self.plan.window_of(start), self.plan.n_windows)
        )
        after = self._told_ahead(next(planned, None))
        while after is not None:
            now = after
            if not early:
                after = self._told_ahead(next(planned, None))  # comes while this one is decoded and consumed
            yield partial(self._made, *now)
            if early:
                after, early = self._told_ahead(next(planned, None)), early - 1

    def _made(self, window: WindowPlan, runs: list[tuple[int, int]]) -> Window:
        """The cells of a window, on the device if it is a GPU."""
        loaded = (self.resident or self.source).load(runs, window.order)
        proteins = self.source.proteins(loaded, runs)
        small = self._columns(loaded.rows)
        if proteins is not None:
            small["proteins"] = torch.from_numpy(proteins[0][window.order].astype(np.float32))
            small["proteins_measured"] = torch.from_numpy(proteins[1][window.order].astype(bool))
        if self.device.type != "cpu":  # in this thread, while the window before is consumed
            loaded.give_to(self.device)
            small = columns_on(small, self.device)
        return window, loaded, small

    def _told_ahead(self, window: WindowPlan | None) -> tuple[WindowPlan, list[tuple[int, int]]] | None:
        """The window with its ranges of rows in the source, which is told that they will be wanted."""
        if window is None:
            return None
        runs = [(self.first + a, self.first + b) for a, b in window.runs]
        (self.resident or self.source).ahead(runs)
        return window, runs

    def _columns(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The small tensors of a window's cells."""
        columns = self.source.columns

        def codes(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values[rows].astype(np.int64))

        unlabelled = torch.full((len(rows),), UNLABELLED, dtype=torch.int64)
        small = {
            "batch": codes(columns.batch),
            "labels": unlabelled if columns.labels is None else codes(columns.labels),
        }
        if columns.categorical:
            small["categorical"] = torch.stack([codes(values) for values in columns.categorical], dim=1)
        if columns.continuous:
            stacked = np.stack([values[rows] for values in columns.continuous], axis=1)
            small["continuous"] = torch.from_numpy(stacked.astype(np.float32))
        if columns.size_factor is not None:
            small["size_factor"] = torch.from_numpy(columns.size_factor[rows].astype(np.float32))
        return small

    def _batches(
        self,
        planned: WindowPlan,
        loaded: Superbatch,
        small: dict[str, Any],
        *,
        epoch: int,
        start: int,
        ring: DenseRing,
    ) -> Iterator[Batch]:
        sizes = planned.counts.sum(axis=1).tolist()
        ends = [0, *accumulate(sizes)]
        counts, n_genes, steps = planned.counts.tolist(), self.schema.n_genes, self.plan.steps
        n_global = np.diff(self.plan.bounds(planned.first_step, planned.first_step + len(counts))).tolist()
        # of all batches at once: a slice costs as much as a piece of it
        parts: dict[str, Any] = {name: torch.split(tensor, sizes) for name, tensor in small.items()}
        for k in range(max(0, start - planned.first_step), len(counts)):
            step = planned.first_step + k
            a, b = ends[k], ends[k + 1]
            yield Batch(
                counts=PackedCounts(loaded, a, b, n_genes, ring),
                rows=loaded.rows[a:b],
                position=Position(epoch, step + 1) if step + 1 < steps else Position(epoch + 1, 0),
                lanes=tuple(zip(planned.lanes, counts[k], strict=True)),
                n_global=n_global[k],
                **{name: part[k] for name, part in parts.items()},
            )
