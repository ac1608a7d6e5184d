"""A query's counts on disk, for a loader: in a store of ours as it lies, or shuffled into one while it is mapped.

Shuffled once, they are read in long runs in every epoch. The order of cells is the one in which `MemorySource` takes
counts in memory, so the batches are the same, bit for bit.
"""

import hashlib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from scarcade.dataloaders import kernels
from scarcade.dataloaders.shuffle import Dealer, bits_for, buckets
from scarcade.dataloaders.sources import Columns, Runs, StoreSource, check_columns, drawn_keys, positions_of
from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.superbatch import Superbatch, renamed
from scarcade.dataloaders.unread_counts import Unread
from scarcade.dataloaders.writer import CellBlock, StoreWriter
from scarcade.engine.schema import Categories, Schema


@dataclass(frozen=True)
class Stored:
    """Counts in a store, and how a model sees them."""

    store: Store
    nnz: int  # of the model's genes
    genes: np.ndarray | None = None  # int32: place of each gene of the store, -1 if not wanted; None: they are the same
    cells: np.ndarray | None = None  # which cell of the query each row of the store is; None: the same
    seed: int | None = None  # that the order of cells was drawn from; None: the store's own

    @property
    def n_cells(self) -> int:
        return self.store.n_cells


def shuffled(unread: Unread, folder: Path, seed: int) -> Stored:
    """The cells in a new store below `folder`, in the model's genes and in the order that `seed` draws.

    Raises:
        OSError: the disk is full. CsrError, CountsError, OpenError: the counts cannot be used.
    """
    n = unread.n_cells
    order = np.argsort(drawn_keys(n, seed), kind="stable")
    ranks = np.empty(n, np.uint64)  # as keys they fill the buckets evenly, and no two are the same
    ranks[order] = np.arange(n, dtype=np.uint64) * np.uint64((2**64 - 1) // max(n, 1))
    np.save(folder / "keys.npy", ranks)
    bits = bits_for(unread.matrix.n_stored, n)
    largest = 0.0
    with Dealer(folder, bits) as dealer:
        for first, block in unread.blocks(folder):
            keys = ranks[first : first + block.n_cells]
            dealt, _ = dealer.deal(block, keys, unread.columns, unread.n_genes, first)
            largest = max(largest, float(dealt.data.max(initial=0)))
    values = np.min_scalar_type(int(largest)) if unread.integer else np.dtype(np.float32)
    types = np.min_scalar_type(max(unread.n_genes - 1, 0)), values
    genes = [str(gene) for gene in range(unread.n_genes)]
    obs = pd.DataFrame({"batch": pd.Categorical(["query"])})
    with StoreWriter(
        folder / "counts.zarr",
        schema=Schema(tuple(genes), Categories("batch", ("query",))),
        var=pd.DataFrame(index=genes),
        index_dtype=types[0],
        value_dtype=types[1],
        seed=seed,
        sources=[],
    ) as writer:
        for bucket in buckets([folder], bits, np.arange(unread.n_genes, dtype=np.int32), unread.n_genes, types):
            here = obs.iloc[np.zeros(bucket.csr.n_cells, np.int64)]
            writer.append(CellBlock(*bucket.csr, bucket.keys, here))
    store = open_store(folder / "counts.zarr")
    return Stored(store, store.nnz, cells=order, seed=seed)


class StoredSource:
    """Cells of `Stored` counts for a loader (`sources.Source`), with columns in the order of the query's cells."""

    def __init__(self, counts: Stored, columns: Columns, schema: Schema) -> None:
        self._counts, self._inner = counts, StoreSource(counts.store)
        self.schema, self.columns = schema, columns
        self.n_cells, self.nnz = counts.n_cells, counts.nnz
        self.least, self.count_bytes = self._inner.least, self._inner.count_bytes
        check_columns(columns, schema, self.n_cells, counts.store.where)

    @cached_property
    def fingerprint(self) -> str:
        """Of the cells, their order, and how they are seen."""
        counts = self._counts
        digest = hashlib.sha256(f"{counts.store.fingerprint} {self.schema.fingerprint()}".encode())
        arrays = [getattr(self.columns, field.name) for field in fields(self.columns)]
        for array in (counts.genes, counts.cells, *arrays):
            for part in array if isinstance(array, tuple) else (array,):
                digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def _in_order(self, values: np.ndarray) -> np.ndarray:
        """Values of the query's cells in the order of the store's rows."""
        return values if self._counts.cells is None else values[self._counts.cells]

    def labels(self) -> np.ndarray | None:
        return None if self.columns.labels is None else self._in_order(self.columns.labels)

    def batches(self) -> np.ndarray:
        return self._in_order(self.columns.batch)

    def n_before(self, fraction: float) -> int:
        """As `Store.n_before`, of the keys that the order of cells was drawn with."""
        seed = self._counts.seed
        if seed is None:
            return self._counts.store.n_before(fraction)
        if fraction >= 1.0:
            return self.n_cells
        return int(np.count_nonzero(drawn_keys(self.n_cells, seed) < np.uint64(fraction * 2.0**64)))

    def ahead(self, runs: Runs) -> None:
        self._inner.ahead(runs)

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        """As `StoreSource.load`, in the model's genes; `rows` are places in the query."""
        loaded = self._inner.load(runs, order)
        if self._counts.genes is not None:
            loaded = renamed(loaded, self._counts.genes, self.schema.n_genes)
            # as they are in memory: sums over a cell's counts go in this order
            kernels.sort_cells(loaded.indices, loaded.data, loaded.starts, loaded.lengths)
        if self._counts.cells is not None:
            loaded.rows = self._counts.cells[loaded.rows]
        return loaded

    def proteins(self, superbatch: Superbatch, runs: Runs) -> tuple[np.ndarray, np.ndarray] | None:
        counts, measured = self.columns.proteins, self.columns.proteins_measured
        if counts is None:
            return None
        rows = positions_of(runs)
        if self._counts.cells is not None:
            rows = self._counts.cells[rows]
        return counts[rows], np.ones((len(rows), counts.shape[1]), bool) if measured is None else measured[rows]
