"""A query's checked counts in the genes of a model: held in memory, streamed from the disk, or looked at and let go.

Whichever it is, the same blocks go through the same checks, and a loader gets the same cells in the same order. So a
query is mapped to the same numbers whether its counts are held or streamed, and memory does not depend on its size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scarcade.dataloaders.counts import Csr
from scarcade.dataloaders.scratch import Scratch
from scarcade.dataloaders.sources import Columns, MemorySource
from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.stored_counts import Stored, StoredSource, shuffled
from scarcade.dataloaders.unread_counts import Unread
from scarcade.engine.errors import StorageError
from scarcade.engine.schema import Schema


@dataclass(frozen=True)
class Seen:
    """Counts that were checked and let go."""

    n_cells: int
    nnz: int


Counts = Csr | Stored | Seen
Keep = Callable[[Unread], Counts]
QuerySource = MemorySource | StoredSource


def held(unread: Unread) -> Csr:
    """All counts in memory."""
    parts = [unread.taken(block) for _, block in unread.blocks()]
    indptr = np.zeros(unread.n_cells + 1, np.int64)
    if parts:
        np.cumsum(np.concatenate([np.diff(part.indptr) for part in parts]), out=indptr[1:])
    empty_values = np.empty(0, np.uint32 if unread.integer else np.float32)
    return Csr(
        indptr,
        np.concatenate([part.indices for part in parts] or [np.empty(0, np.int32)]),
        np.concatenate([part.data for part in parts] or [empty_values]),
    )


def seen(unread: Unread, scratch: Scratch | None = None) -> Seen:
    """The checks alone, in memory of a block."""
    wanted = unread.columns >= 0
    # a column-wise matrix is turned on the disk
    workspace = scratch.made() if scratch is not None and unread.matrix.layout == "csc" else None
    counted = (np.count_nonzero(wanted[block.indices] & (block.data != 0)) for _, block in unread.blocks(workspace))
    try:
        return Seen(unread.n_cells, sum(map(int, counted)))
    finally:
        if scratch is not None and workspace is not None:
            scratch.remove()


def stored(unread: Unread, scratch: Scratch, seed: int) -> Stored:
    """Counts that a loader streams: where they are if they are in a store, else put into one in `scratch`.

    Cells come in the order in which a loader of counts in memory takes them with this `seed`.
    """
    if unread.store is not None:
        store = open_store(unread.store)
        same = np.array_equal(unread.columns, np.arange(unread.n_genes))
        return Stored(store, seen(unread, scratch).nnz, None if same else unread.columns)
    try:
        return shuffled(unread, scratch.made(), seed)
    except OSError as error:
        raise StorageError(f"{scratch.path}: cannot be written ({error.strerror or error})") from error


def keep_for_mapping(scratch: Scratch, *, limit: int, seed: int) -> Keep:
    """In memory what takes at most `limit` bytes there, all else streamed; `seed` is that of the mapping."""

    def keep(unread: Unread) -> Counts:
        return held(unread) if unread.n_bytes <= limit else stored(unread, scratch, seed)

    return keep


def source_of(
    counts: Counts, columns: Columns, schema: Schema, *, seed: int, keys: np.ndarray | None = None
) -> QuerySource:
    """The cells of a query for a loader; `keys` are those of its cells where it is a store of ours.

    Raises:
        CategoryError: codes that do not fit `schema`.
    """
    if isinstance(counts, Csr):
        return MemorySource(counts, columns, schema, keys, seed)
    if isinstance(counts, Seen) or counts.seed not in (None, seed):
        raise ValueError(f"counts that were not kept, or for another seed than {seed}: {counts}")
    return StoredSource(counts, columns, schema)
