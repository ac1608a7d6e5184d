"""Cells that a trained model is asked about: an AnnData or file in memory, or a store on disk, in one form.

Codes are translated by value into the model's. A batch that the model does not know keeps a code of its own,
beyond the model's, and is refused where it would matter; it never becomes another batch in silence.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from scarcade.dataloaders.aligned import AlignedSource, AlignedStore, aligned, unknown_labels
from scarcade.dataloaders.loader import Columns, LoaderConfig, in_memory, stream
from scarcade.dataloaders.packed import DenseRing, PackedCounts
from scarcade.dataloaders.schema import (
    DataWarning,
    Query,
    code_of,
    column_of,
    complete_text,
    label_text,
    read_query,
    text_of,
)
from scarcade.dataloaders.store import Store, is_store, open_store
from scarcade.dataloaders.stratified import DrawnSource
from scarcade.engine.contracts import Batch, Loader
from scarcade.engine.errors import CategoryError, UsageError
from scarcade.engine.schema import UNLABELLED, Categories, Schema
from scarcade.models.model import AtlasModel


@dataclass(frozen=True)
class MemoryCells:
    """Cells of an AnnData, an .h5ad or a .zarr, in their order, with codes of the model."""

    where: str
    counts: sparse.csr_matrix
    columns: Columns
    schema: Schema
    cell_names: np.ndarray
    unknown_batches: tuple[str, ...]  # values that occur, and that the model does not know
    obs: Any = None  # pandas.DataFrame
    labels: tuple[tuple[Categories, np.ndarray], ...] = ()  # the model's label columns, new values behind its own
    notes: tuple[str, ...] = ()  # what a user should know of genes, proteins and labels

    @property
    def n_cells(self) -> int:
        return int(self.counts.shape[0])

    def names(self) -> np.ndarray:
        """Names of all cells (n,)."""
        return self.cell_names

    def some_names(self, start: int, stop: int) -> np.ndarray:
        """Names of the cells [start, stop)."""
        return self.cell_names[start:stop]

    def described(self) -> list[tuple[Categories, np.ndarray]]:
        """Batch and labels as columns of obs: categories and the codes of all cells."""
        return distinct([(self.schema.batch, self.columns.batch), *self.labels])

    def codes_of(self, column: Categories) -> np.ndarray:
        """The cells' codes (n,) in the batch or a label column of the model; -1 where they have none that it knows."""
        if column.name == self.schema.batch.name:
            return self.columns.batch
        found = {known.name: codes for known, codes in self.labels}
        return _known(found.get(column.name, np.full(self.n_cells, UNLABELLED, np.int8)), column)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All cells in their order."""
        return self.loader(batch_size).epoch(0)

    def loader(self, batch_size: int) -> Loader:
        config = LoaderConfig(batch_size=checked_batch_size(batch_size), validation=0.0)
        return in_memory(self.counts, self.columns, self.schema, config, seed=0, lanes=1, shuffle=False)

    def take(self, rows: np.ndarray) -> "MemoryCells":
        """The cells of some rows: any order, repeats allowed."""
        columns = _rows_of(self.columns, rows)
        obs = None if self.obs is None else self.obs.iloc[rows]
        labels = tuple((known, codes[rows]) for known, codes in self.labels)
        used = replace(self, counts=self.counts[rows], columns=columns, cell_names=self.cell_names[rows], obs=obs)
        used = replace(used, labels=labels)
        present = {self.schema.batch.values[code] for code in np.unique(columns.batch)}
        return replace(used, unknown_batches=tuple(b for b in self.unknown_batches if b in present))

    def column(self, name: str) -> np.ndarray:
        """The values of an obs column as text, None where missing (n,)."""
        if self.obs is None:
            raise CategoryError(f"{self.where}: has no obs columns")
        return text_of(column_of(self.obs, name, self.where, "groupby"))


@dataclass(frozen=True)
class StoreCells:
    """Cells of a store, streamed; with the methods of `MemoryCells`."""

    view: AlignedStore  # with the unknown batches after the model's own
    unknown_batches: tuple[str, ...]

    @property
    def where(self) -> str:
        return self.view.store.where

    @property
    def n_cells(self) -> int:
        return self.view.n_cells

    @property
    def notes(self) -> tuple[str, ...]:
        return self.view.notes

    @cached_property
    def _source(self) -> AlignedSource:
        return self.view.source()

    def names(self) -> np.ndarray:
        return self.some_names(0, self.n_cells)

    def some_names(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.view.store.names(start, stop))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self.loader(batch_size).epoch(0)

    def loader(self, batch_size: int) -> Loader:
        config = LoaderConfig(batch_size=checked_batch_size(batch_size), validation=0.0)
        return stream(self.view, "all", config, seed=0, lanes=1, shuffle=False)

    def described(self) -> list[tuple[Categories, np.ndarray]]:
        store = self.view.store
        return distinct([(one, store.codes(one.name)) for one in (store.schema.batch, *store.schema.labels)])

    def codes_of(self, column: Categories) -> np.ndarray:
        view = self.view
        labels = {known.name: codes for known, codes in view.label_columns()}
        if column.name != view.schema.batch.name and column.name in labels:
            return labels[column.name]
        return view.codes(view.batch)

    def take(self, rows: np.ndarray) -> MemoryCells:
        wanted, back = np.unique(rows, return_inverse=True)
        drawn, runs = DrawnSource(self._source, wanted), [(0, len(wanted))]
        loaded, schema = drawn.load(runs, back), self.view.schema
        indptr, indices, data = PackedCounts(loaded, 0, len(rows), schema.n_genes, DenseRing()).csr()
        columns = _rows_of(self._source.columns, rows)
        if (both := drawn.proteins(loaded, runs)) is not None:
            columns = replace(columns, proteins=both[0][back], proteins_measured=both[1][back])
        present = {schema.batch.values[code] for code in np.unique(columns.batch)}
        return MemoryCells(
            where=self.where,
            counts=sparse.csr_matrix((data, indices, indptr), shape=(len(rows), schema.n_genes)).sorted_indices(),
            columns=columns,
            schema=schema,
            cell_names=np.asarray(rows).astype(str),
            unknown_batches=tuple(b for b in self.unknown_batches if b in present),
            notes=self.notes,
        )

    def column(self, name: str) -> np.ndarray:
        store = self.view.store
        for column in (store.schema.batch, *store.schema.labels, *store.schema.categorical):
            if column.name == name:  # without reading all of obs
                values = np.array([*column.values, None], dtype=object)
                found: np.ndarray = values[store.codes(name)]
                return found
        return text_of(column_of(store.obs(), name, self.where, "groupby"))


Cells = MemoryCells | StoreCells


def checked_batch_size(batch_size: int) -> int:
    """`batch_size`, if so many cells can be computed at once.

    Raises:
        UsageError: it is not 1 or more.
    """
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: wanted are 1 or more cells to compute at once")
    return batch_size


def cells_of(data: Any, model: AtlasModel, *, batch_key: str | None = None, layer: str | None = None) -> Cells:
    """`data` as cells of `model`. What a user should know of them is told by a `DataWarning`.

    Args:
        data: a store or its path (streamed); an .h5ad, a .zarr or an AnnData (in memory); cells of this model, which
            are given back.
        batch_key: obs column with the batch; the one that the model was trained with, where there is such.

    Raises:
        GenesError: genes that are not the model's. CategoryError: a covariate that is missing or not known.
    """
    if isinstance(data, MemoryCells | StoreCells):
        return data
    if isinstance(data, Store) or is_store(data):
        cells: Cells = _store_cells(data if isinstance(data, Store) else open_store(data), model)
    else:
        cells = _memory_cells(data, model, batch_key, layer)
    for line in cells.notes:
        warnings.warn(line, DataWarning, stacklevel=3)
    return cells


def _memory_cells(data: Any, model: AtlasModel, batch_key: str | None, layer: str | None) -> MemoryCells:
    reference = model.schema
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # it is among the notes
        query = read_query(data, replace(model.reads, labels=()), layer=layer)
    batch = query.batch
    if batch_key is not None or reference.batch.name in query.obs.columns:
        batch = complete_text(query.obs, batch_key or reference.batch.name, query.where, "batch_key")
    known = reference.batch.extended(tuple(map(str, batch)))
    table = known.codes()
    codes = np.array([table[str(value)] for value in batch], np.int64)
    labels = tuple(_labels(query, one, reference.unlabelled) for one in reference.labels)
    columns = batch_columns(query, codes, reference)
    if labels:
        columns = replace(columns, labels=_known(labels[0][1], reference.labels[0]))
    all_there = f" {len(reference.proteins)} of the model's {len(reference.proteins)} proteins are there"
    notes = [line for line in query.warnings if not line.endswith(all_there)]
    for ours, (seen, _) in zip(reference.labels, labels, strict=True):
        if surplus := seen.values[len(ours) :]:
            notes.append(unknown_labels(query.where, ours.name, surplus))
    indptr, indices, counts = query.csr
    return MemoryCells(
        where=query.where,
        counts=sparse.csr_matrix((counts, indices, indptr), shape=(query.n_cells, reference.n_genes)),
        columns=columns,
        schema=replace(reference, batch=known),
        cell_names=query.obs.index.to_numpy(),
        unknown_batches=known.values[len(reference.batch) :],
        obs=query.obs,
        labels=labels,
        notes=tuple(notes),
    )


def _labels(query: Query, known: Categories, unlabelled: Sequence[str]) -> tuple[Categories, np.ndarray]:
    """A label column of a query with its own values behind the `known`, and the codes (n,); -1: no label."""
    if known.name not in query.obs.columns:
        return known, np.full(query.n_cells, UNLABELLED, np.int64)
    text = label_text(column_of(query.obs, known.name, query.where, "a label column of the model"), unlabelled)
    grown = known.extended([str(value) for value in text if value is not None])
    return grown, code_of(text, grown).astype(np.int64)


def _known(codes: np.ndarray, column: Categories) -> np.ndarray:
    """Label codes with -1 for values that `column` does not have."""
    return np.where(codes < len(column), codes, UNLABELLED)


def batch_columns(query: Query, codes: np.ndarray, reference: Schema) -> Columns:
    """The columns of a query for `in_memory`, with the `codes` (n,) of its batches.

    Raises:
        CategoryError: a categorical covariate has a value that the reference does not know.
    """
    categorical = []
    for known, values in zip(reference.categorical, query.categorical, strict=True):
        table = known.codes()
        if surplus := sorted({str(value) for value in values if value not in table}):
            raise _unknown(query.where, known.name, surplus)
        categorical.append(np.array([table[value] for value in values], np.int64))
    return Columns(
        batch=codes,
        labels=query.labels[0] if query.labels else None,
        categorical=tuple(categorical),
        continuous=tuple(query.continuous.T),
        size_factor=query.size_factor,
        proteins=query.proteins,
        proteins_measured=query.proteins_measured,
    )


def _store_cells(store: Store, model: AtlasModel) -> StoreCells:
    reference = model.schema
    view = aligned(store, model.reads)
    for ours, seen in zip(reference.categorical, view.schema.categorical, strict=True):
        if surplus := seen.values[len(ours) :]:
            raise _unknown(store.where, ours.name, surplus)
    return StoreCells(view, view.schema.batch.values[len(reference.batch) :])


def refuse_unknown(cells: Cells, model: AtlasModel, *, decoding: bool) -> bool:
    """Whether the batch of these cells has any effect; if not, any code will do.

    Raises:
        CategoryError: it has, and some cells are of a batch that the model does not know.
    """
    matters = len(model.schema.batch) > 1 and (decoding or model.encodes_batch)
    if matters and cells.unknown_batches:
        shown = ", ".join(map(repr, cells.unknown_batches[:5])) + (", ..." if len(cells.unknown_batches) > 5 else "")
        remedy = "learn it by surgery: `scarcade map`, then `scarcade merge`, whose model `scarcade embed` takes"
        if not model.encodes_batch:  # else no cell gets as far as to be decoded
            remedy += "; or decode the cells as if of a known one with --transform-batch"
        raise CategoryError(
            f"{cells.where}: the model does not know the batch {shown} of column '{model.schema.batch.name}'; {remedy}"
        )
    return matters


def distinct(columns: Sequence[tuple[Categories, np.ndarray]]) -> list[tuple[Categories, np.ndarray]]:
    """Each name once: a label column may be the batch column too."""
    return list({column.name: (column, codes) for column, codes in columns}.values())


def _unknown(where: str, column: str, values: Sequence[str]) -> CategoryError:
    return CategoryError(
        f"{where}: column '{column}' has values that the model does not know: {', '.join(values[:5])}; "
        "architecture surgery learns new categories (`scarcade map`)"
    )


def _rows_of(columns: Columns, rows: np.ndarray) -> Columns:
    """What stands beside some cells."""

    def of(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[rows]

    return Columns(
        batch=columns.batch[rows],
        labels=of(columns.labels),
        categorical=tuple(values[rows] for values in columns.categorical),
        continuous=tuple(values[rows] for values in columns.continuous),
        size_factor=of(columns.size_factor),
        proteins=of(columns.proteins),
        proteins_measured=of(columns.proteins_measured),
    )
