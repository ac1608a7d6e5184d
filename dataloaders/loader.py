"""Loaders of cells and how they are asked for: source + plan -> `CellLoader`.

`stream` reads a store, `in_memory` reads arrays; the same cells give the same batches from both. Cells that are no more
than one window are decoded once (`held`), and what fits into the memory of a GPU stays there (`resident`).
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from scarcade.dataloaders.aligned import AlignedStore
from scarcade.dataloaders.cell_loader import CPU, CellLoader
from scarcade.dataloaders.held import HeldSource
from scarcade.dataloaders.plan import Plan, lanes_for
from scarcade.dataloaders.resident import Resident, room_on
from scarcade.dataloaders.sources import Columns, MemorySource, Reading, Source, StoreSource
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.stored_counts import StoredSource
from scarcade.engine.config import Section
from scarcade.engine.errors import UsageError
from scarcade.engine.schema import Schema, Shard

__all__ = ["CellLoader", "Columns", "LoaderConfig", "in_memory", "lanes_for", "of_source", "stream"]

Split = Literal["train", "validation", "all"]
_COUNT_BYTES = 4  # of a decoded count, at least: of 65,535 genes and counts, as nearly all data have
_WINDOWS_HELD = 2  # one is consumed, the next is filled; for a GPU, which has those that are consumed, two are filled
_MOST_DECODERS = 12  # shares of a window that are decoded side by side


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
    device: torch.device = CPU,
    proteins: bool = True,
) -> CellLoader:
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
) -> CellLoader:
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
) -> CellLoader:
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
    device: torch.device = CPU,
    counts: Store | None = None,
) -> CellLoader:
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
