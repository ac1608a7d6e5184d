"""Batches of cells with their position: source + plan + prefetch.

`stream` reads a store, `in_memory` reads arrays; the same cells give the same batches from both. A window of
cells is decoded in a thread while the one before is consumed; batches are views into it. Cells that are no more than
one window are decoded once (`held`).
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, islice
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from scarcade.dataloaders.aligned import AlignedStore
from scarcade.dataloaders.held import HeldSource
from scarcade.dataloaders.on_gpu import columns_on
from scarcade.dataloaders.packed import DenseRing, PackedCounts
from scarcade.dataloaders.plan import Plan, WindowPlan, lanes_for
from scarcade.dataloaders.prefetch import Prefetch, SideBySide
from scarcade.dataloaders.resident import Resident, room_on
from scarcade.dataloaders.sources import Columns, MemorySource, Reading, Source, StoreSource
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.stored_counts import StoredSource
from scarcade.dataloaders.superbatch import Superbatch
from scarcade.engine.config import Section
from scarcade.engine.contracts import Batch
from scarcade.engine.errors import UsageError
from scarcade.engine.schema import UNLABELLED, Position, Schema, Shard

__all__ = ["CellLoader", "Columns", "LoaderConfig", "in_memory", "lanes_for", "of_source", "stream"]

Split = Literal["train", "validation", "all"]
Window = tuple[WindowPlan, Superbatch, dict[str, Tensor]]
_COUNT_BYTES = 4  # of a decoded count, at least: of 65,535 genes and counts, as nearly all data have
_WINDOWS_HELD = 2  # one is consumed, the next is filled; for a GPU, which has those that are consumed, two are filled
_CPU = torch.device("cpu")
_MOST_DECODERS = 12  # shares of a window that are decoded side by side
_MAKERS = 2  # windows for a GPU that are made at a time: one is copied, or waits for its threads, beside the other


class LoaderConfig(Section):
    """How cells are read."""

    batch_size: int = Field(128, ge=1, description="cells of a global batch, over all workers")
    validation: float = Field(0.1, ge=0, lt=1, description="fraction of the cells that is held out, by their keys")
    window: int = Field(32768, ge=1, description="cells that are shuffled among each other, over all workers")
    lanes: int | None = Field(None, ge=1, description="stretches read in turn; fixed for a run (8, or more workers)")
    memory: int = Field(1 << 30, ge=1 << 20, description="bytes of decoded cells; the window shrinks to fit them")
    gpu_memory: int | None = Field(
        None,
        ge=0,
        description="bytes of a GPU for counts that stay there from one epoch to the next, if all do: larger data come "
        "anew in each (default: a quarter of what is free; 0: never)",
    )
    read_ahead: bool = Field(True, description="decode the next window in a thread of its own")
    cache: str | None = Field(
        None,
        description="folder on the local disk for shards of a store at a URL (default: SCARCADE_CACHE, or the user's)",
    )
    cache_gb: float | None = Field(
        None,
        ge=0,
        description="gigabytes that they may take, over all runs; 0: none are kept "
        "(default: SCARCADE_CACHE_GB, or half of what the disk has free)",
    )
    stratify: bool = Field(False, description="cells of each batch are met equally often in training")
    samples_per_label: int | None = Field(
        None, ge=1, description="labelled cells of each label in an epoch (scanvi), drawn anew for each; all if not set"
    )
    edit_labels: bool = Field(
        False,
        description="scanvi with --init-from: labels that most neighbours of a cell contradict in that model's latent "
        "are not learnt",
    )


def stream(
    store: Store | AlignedStore,
    split: Split,
    config: LoaderConfig,
    *,
    seed: int,
    shard: Shard = Shard(),  # noqa: B008 - frozen
    lanes: int | None = None,
    shuffle: bool = True,
    device: torch.device = _CPU,
    proteins: bool = True,
) -> "CellLoader":
    """Batches of a split of `store` (aligned: as a model sees it). Validation is the prefix of rows with small keys.

    ``shuffle=False`` with ``lanes=1`` gives the rows as they lie on disk. With a GPU as `device` windows are copied
    there ahead, and several threads decode them: the processor has nothing else to do. What fits into its memory stays
    there (`resident`). Without `proteins` those of the store are not read.

    Raises:
        UsageError: a split without cells, or fewer lanes than workers.
    """
    held_out = store.n_before(config.validation)
    reading = Reading(proteins=proteins)
    if device.type != "cpu":
        reading = Reading(_decoders(), device.type == "cuda", proteins)
    source: Source
    if isinstance(store, AlignedStore):
        source, counts = store.source(reading), store.store
    else:
        source, counts = StoreSource(store, reading), store
    how: dict[str, Any] = {"seed": seed, "shard": shard, "lanes": lanes, "shuffle": shuffle, "device": device}
    return _loader(source, split, held_out, config, **how, counts=counts)


def _decoders() -> int:
    """Threads that decode a window for a GPU: those that the process may compute with, but for the one that trains."""
    return max(1, min(torch.get_num_threads() - 1, _MOST_DECODERS))


def in_memory(
    counts: Any,
    columns: Columns,
    schema: Schema,
    config: LoaderConfig,
    *,
    seed: int,
    shard: Shard = Shard(),  # noqa: B008 - frozen
    lanes: int | None = None,
    shuffle: bool = True,
    keys: np.ndarray | None = None,
    split: Split = "all",
) -> "CellLoader":
    """Batches of cells in memory: a scipy matrix, a dense array or (indptr, indices, data), cells x genes.

    With the `keys` (uint64) of a store's cells these are the batches that the store would give; without, keys
    are drawn from `seed`. `Batch.rows` are places in `counts`. ``shuffle=False, lanes=1`` keeps the given order.

    Raises:
        CsrError, CategoryError: structure or codes that do not fit `schema`.
    """
    if keys is None and not shuffle and split == "all":
        keys = np.arange(np.shape(counts)[0] if not isinstance(counts, tuple) else len(counts[0]) - 1, dtype=np.uint64)
    source = MemorySource(counts, columns, schema, keys, seed)
    return of_source(source, split, config, seed=seed, shard=shard, lanes=lanes, shuffle=shuffle)


def of_source(
    source: MemorySource | StoredSource,
    split: Split,
    config: LoaderConfig,
    *,
    seed: int,
    shard: Shard = Shard(),  # noqa: B008 - frozen
    lanes: int | None = None,
    shuffle: bool = True,
) -> "CellLoader":
    """Batches of a split of a query's cells, held in memory or streamed (`query_counts.source_of`).

    ``shuffle=False, lanes=1`` gives them in the order of their keys.

    Raises:
        UsageError: as `stream`.
    """
    held_out = source.n_before(config.validation)
    return _loader(source, split, held_out, config, seed=seed, shard=shard, lanes=lanes, shuffle=shuffle)


def _loader(
    source: Source,
    split: Split,
    n_validation: int,
    config: LoaderConfig,
    *,
    seed: int,
    shard: Shard,
    lanes: int | None,
    shuffle: bool,
    device: torch.device = _CPU,
    counts: Store | None = None,
) -> "CellLoader":
    """`counts`: the store in whose rows `source` has its cells."""
    ranges = {"train": (n_validation, source.n_cells), "validation": (0, n_validation), "all": (0, source.n_cells)}
    if split not in ranges:
        raise UsageError(f"no split '{split}'; there are train, validation and all")
    first, last = ranges[split]
    if first >= last:
        raise UsageError(
            f"the {split} split has no cells: {n_validation} of {source.n_cells} cells are held out by "
            f"--data.validation {config.validation}"
        )
    # from facts of the data alone, so that every worker and every later run has the same windows
    per_cell = max(1, max(_COUNT_BYTES, source.count_bytes) * source.nnz // source.n_cells)
    window = max(config.batch_size, min(config.window, config.memory // (_WINDOWS_HELD * per_cell)))
    lanes = lanes or config.lanes or lanes_for(shard.size)
    plan = Plan(last - first, config.batch_size, lanes=lanes, window=window, seed=seed, shuffle=shuffle)
    if not 0 <= shard.rank < shard.size <= lanes:
        raise UsageError(f"worker {shard.rank} of {shard.size} with {lanes} lanes; set --data.lanes to {shard.size}")
    if counts is not None and config.read_ahead and shuffle and device.type != "cpu":  # else they are read once
        wanted = Resident.bytes_for(counts, first, last, source.count_bytes)
        if wanted <= room_on(device, config.gpu_memory):
            resident = Resident(source, counts, first, last, device)
            return CellLoader(source, plan, first, shard, device=device, resident=resident)
    fits = shard.size * per_cell * (last - first) <= config.memory // _WINDOWS_HELD  # on each worker
    if source.least and shuffle and plan.n_windows == 1 and fits:
        return CellLoader(HeldSource(source, first, last - first), plan, first, shard, read_ahead=False, device=device)
    return CellLoader(source, plan, first, shard, read_ahead=config.read_ahead, device=device)


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
        device: torch.device = _CPU,
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
