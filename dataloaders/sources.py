"""Where a loader's cells come from: a store on disk, or arrays in memory. Both give the same superbatches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from scarcade.dataloaders.decoder import Decoder
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.superbatch import BufferPool, Superbatch
from scarcade.engine import csr
from scarcade.engine.errors import CategoryError, CsrError
from scarcade.engine.schema import UNLABELLED, Schema

Runs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Columns:
    """What stands beside the counts of n cells, as codes of the schema."""

    batch: np.ndarray  # (n,) integers
    labels: np.ndarray | None = None  # (n,) integers, -1: unlabelled
    categorical: tuple[np.ndarray, ...] = ()  # each (n,) integers
    continuous: tuple[np.ndarray, ...] = ()  # each (n,) float32
    size_factor: np.ndarray | None = None  # (n,) float32
    proteins: np.ndarray | None = None  # (n, P)
    proteins_measured: np.ndarray | None = None  # bool (n, P)


class Source(Protocol):
    """The cells that a loader draws from."""

    schema: Schema
    n_cells: int
    nnz: int
    columns: Columns
    least: int  # counts that must be decoded for a range of a single cell
    count_bytes: int  # of a decoded count: gene index and value

    @property
    def fingerprint(self) -> str:
        """Of the cells and their order."""
        ...

    def labels(self) -> np.ndarray | None:
        """Codes of the primary label in the order of positions (those of `load`); None without a label column."""
        ...

    def batches(self) -> np.ndarray:
        """Codes of the batch in the order of positions."""
        ...

    def ahead(self, runs: Runs) -> None:
        """These ranges will be loaded after those that were told before: what is far away begins to come."""
        ...

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        """The cells of some ranges of rows, put into `order` (places in those ranges, one behind the other)."""
        ...

    def proteins(self, superbatch: Superbatch, runs: Runs) -> tuple[np.ndarray, np.ndarray] | None:
        """(counts, measured) of the cells of `runs`, in the order of `runs`; None without proteins."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """How the cells of a store are read."""

    threads: int = 1  # that decode the ranges of a window side by side
    pinned: bool = False  # into page-locked memory, from where a GPU fetches them by itself
    proteins: bool = True  # those of the store, too


class StoreSource:
    """Cells of a store. Decodes chunks straight into reused buffers; checks every byte and every column index."""

    def __init__(self, store: Store, reading: Reading = Reading()) -> None:
        self.store, self.reading = store, reading
        self.schema, self.n_cells, self.nnz = store.schema, store.n_cells, store.nnz
        self.fingerprint = store.fingerprint
        schema = store.schema
        continuous = tuple(store.codes(name) for name in schema.continuous)
        size_factor = store.codes(schema.size_factor) if schema.size_factor else None
        self.columns = Columns(
            batch=store.codes(schema.batch.name),
            labels=store.codes(schema.labels[0].name) if schema.labels else None,
            categorical=tuple(store.codes(column.name) for column in schema.categorical),
            continuous=continuous,
            size_factor=size_factor,
        )
        check_columns(self.columns, schema, self.n_cells, store.where)
        self._pool = BufferPool(store.x_indices.dtype, store.x_data.dtype, pinned=reading.pinned)
        self._decoder = Decoder(store, reading.threads)
        self.least = self._decoder.step
        self.count_bytes = store.x_indices.dtype.itemsize + store.x_data.dtype.itemsize

    def labels(self) -> np.ndarray | None:
        return self.columns.labels

    def batches(self) -> np.ndarray:
        return self.columns.batch

    def ahead(self, runs: Runs) -> None:
        self.store.ahead(runs, proteins=self.reading.proteins)

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        """Each chunk is decoded while it is in the cache, and its cells are copied to where they belong in `order`.

        So a batch is one piece of memory: made dense without jumps, and 12 % fewer bytes than whole chunks.
        """
        store = self.store
        rows = positions_of(runs)
        lengths = store.lengths[rows].astype(np.int64)
        ends = np.cumsum(lengths[order])
        indices, data = self._pool.lend(int(ends[-1]) if len(ends) else 0)
        starts = ends - lengths[order]
        loaded = Superbatch(
            indices,
            data,
            starts=starts,
            lengths=lengths[order].astype(np.int32),
            rows=rows[order],
            in_order=True,
        )
        places = np.empty(len(rows), np.int64)
        places[order] = starts
        self._decoder.put(runs, lengths, places, indices, data)
        return loaded

    def proteins(self, superbatch: Superbatch, runs: Runs) -> tuple[np.ndarray, np.ndarray] | None:
        if not self.reading.proteins:
            return None
        parts = [both for start, stop in runs or [(0, 0)] if (both := self.store.proteins(start, stop)) is not None]
        if not parts:
            return None
        return np.concatenate([counts for counts, _ in parts]), np.concatenate([measured for _, measured in parts])


class MemorySource:
    """Cells in memory, taken in the order of their keys, as a store of the same cells would have them."""

    def __init__(self, counts: Any, columns: Columns, schema: Schema, keys: np.ndarray | None, seed: int) -> None:
        self.schema, self.columns = schema, columns
        self.indptr, self.indices, self.data = _csr(counts)
        self.n_cells, self.nnz = len(self.indptr) - 1, len(self.data)
        wrong, row = csr.check_rows(self.indptr, self.indices, schema.n_genes)
        if wrong or len(self.indices) != len(self.data):
            raise CsrError(f"counts in memory: row {row} has columns out of order or beyond {schema.n_genes} genes")
        check_columns(columns, schema, self.n_cells, "columns in memory")
        if keys is None:
            keys = drawn_keys(self.n_cells, seed)
        if len(keys) != self.n_cells:
            raise CsrError(f"{len(keys)} keys for {self.n_cells} cells in memory")
        self.place = np.argsort(keys, kind="stable")
        self.sorted_keys = np.asarray(keys, np.uint64)[self.place]
        self.least = 0
        self.count_bytes = 0  # nothing is decoded

    @cached_property
    def fingerprint(self) -> str:
        """Of the cells and their order; made when it is asked for, because many never ask."""
        digest = hashlib.sha256(self.schema.fingerprint().encode())
        arrays = [getattr(self.columns, field.name) for field in fields(self.columns)]
        for array in (self.indptr, self.indices, self.data, self.place, *arrays):
            for part in array if isinstance(array, tuple) else (array,):
                digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def labels(self) -> np.ndarray | None:
        return None if self.columns.labels is None else self.columns.labels[self.place]

    def batches(self) -> np.ndarray:
        codes: np.ndarray = self.columns.batch[self.place]
        return codes

    def n_before(self, fraction: float) -> int:
        """As `Store.n_before`."""
        if fraction >= 1.0:
            return self.n_cells
        return int(np.searchsorted(self.sorted_keys, np.uint64(fraction * 2.0**64), side="left"))

    def ahead(self, runs: Runs) -> None:
        """Memory is near."""

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        rows = self.place[positions_of(runs)[order]]
        starts = self.indptr[rows]
        lengths = (self.indptr[rows + 1] - starts).astype(np.int32)
        return Superbatch(self.indices, self.data, starts=starts, lengths=lengths, rows=rows)

    def proteins(self, superbatch: Superbatch, runs: Runs) -> tuple[np.ndarray, np.ndarray] | None:
        counts, measured = self.columns.proteins, self.columns.proteins_measured
        if counts is None:
            return None
        rows = self.place[positions_of(runs)]
        return counts[rows], np.ones((len(rows), counts.shape[1]), bool) if measured is None else measured[rows]


def positions_of(runs: Runs) -> np.ndarray:
    """Those of some ranges, one behind the other, int64; none of no range: of few cells a worker may have none."""
    return np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in runs)])


def drawn_keys(n_cells: int, seed: int) -> np.ndarray:
    """Keys uint64 (n,) of cells that have none of their own."""
    keys: np.ndarray = np.random.Philox(np.random.SeedSequence((seed, n_cells))).random_raw(n_cells)
    return keys


def _csr(counts: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indptr, indices, data) of a scipy matrix, a dense array or such a triple; rows sorted by column."""
    if isinstance(counts, tuple):
        indptr, indices, data = counts
    else:
        import scipy.sparse as sp

        matrix = sp.csr_matrix(counts)
        if not matrix.has_sorted_indices:
            matrix = matrix.sorted_indices()
        indptr, indices, data = matrix.indptr, matrix.indices, matrix.data
    return np.ascontiguousarray(indptr, np.int64), np.ascontiguousarray(indices), np.ascontiguousarray(data)


def check_columns(columns: Columns, schema: Schema, n_cells: int, where: str) -> None:
    """Every column has `n_cells` entries, every code is one of the schema's, every number is finite.

    Raises:
        CategoryError: naming the column.
    """
    categorical = [
        (schema.batch, columns.batch, 0),
        *((c, v, 0) for c, v in zip(schema.categorical, columns.categorical, strict=False)),
    ]
    if columns.labels is not None and schema.labels:
        categorical.append((schema.labels[0], columns.labels, UNLABELLED))
    for wanted, codes, least in categorical:
        if len(codes) != n_cells or (n_cells and (codes.min() < least or codes.max() >= len(wanted))):
            raise CategoryError(f"{where}: '{wanted.name}' is not {n_cells} codes from {least} to {len(wanted) - 1}")
    numbers = list(zip(schema.continuous, columns.continuous, strict=False))
    if columns.size_factor is not None:
        numbers.append((schema.size_factor or "size factor", columns.size_factor))
    for name, values in numbers:
        if len(values) != n_cells or not np.isfinite(values).all():
            raise CategoryError(f"{where}: '{name}' is not {n_cells} finite numbers")
    for given, wanted_n, name in (
        (columns.categorical, len(schema.categorical), "categorical"),
        (columns.continuous, len(schema.continuous), "continuous"),
    ):
        if len(given) != wanted_n:
            raise CategoryError(f"{where}: {len(given)} {name} covariates where the schema has {wanted_n}")
