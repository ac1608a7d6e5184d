"""Cells that a trained model is asked about: an AnnData or file in memory, or a store on disk, in one form.

Codes are translated by value into the model's. A batch that the model does not know keeps a code of its own,
beyond the model's, and is refused where it would matter; it never becomes another batch in silence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import sparse

from scarcade.dataloaders.loader import Columns, LoaderConfig, in_memory, stream
from scarcade.dataloaders.schema import column_of, complete_text, read_query, text_of
from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.contracts import UNLABELLED, Batch, Categories, Loader, Schema
from scarcade.engine.errors import CategoryError, GenesError
from scarcade.jobs.embed import is_store
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

    @property
    def n_cells(self) -> int:
        return int(self.counts.shape[0])

    def names(self) -> np.ndarray:
        """Names of all cells (n,)."""
        return self.cell_names

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All cells in their order."""
        return self.loader(batch_size).epoch(0)

    def loader(self, batch_size: int) -> Loader:
        config = LoaderConfig(batch_size=batch_size, validation=0.0)
        return in_memory(self.counts, self.columns, self.schema, config, seed=0, lanes=1, shuffle=False)

    def take(self, rows: np.ndarray) -> "MemoryCells":
        """The cells of some rows: any order, repeats allowed."""
        c = self.columns
        columns = Columns(
            batch=c.batch[rows],
            labels=None if c.labels is None else c.labels[rows],
            categorical=tuple(values[rows] for values in c.categorical),
            continuous=tuple(values[rows] for values in c.continuous),
            size_factor=None if c.size_factor is None else c.size_factor[rows],
            proteins=None if c.proteins is None else c.proteins[rows],
            proteins_measured=None if c.proteins_measured is None else c.proteins_measured[rows],
        )
        obs = None if self.obs is None else self.obs.iloc[rows]
        used = replace(self, counts=self.counts[rows], columns=columns, cell_names=self.cell_names[rows], obs=obs)
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

    store: Store
    schema: Schema  # the model's, with the unknown batches after its own
    tables: dict[str, np.ndarray]  # "batch", "labels", "categorical_0", ...: the store's codes -> the model's
    unknown_batches: tuple[str, ...]

    @property
    def where(self) -> str:
        return str(self.store.path)

    @property
    def n_cells(self) -> int:
        return self.store.n_cells

    def names(self) -> np.ndarray:
        return np.asarray(self.store.names(0, self.n_cells))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        config = LoaderConfig(batch_size=batch_size, validation=0.0)
        loader = stream(self.store, "all", config, seed=0, lanes=1, shuffle=False)
        for batch in loader.epoch(0):
            categorical = batch.categorical
            if categorical is not None:
                parts = [self.tables[f"categorical_{i}"][c.numpy()] for i, c in enumerate(categorical.unbind(-1))]
                categorical = torch.from_numpy(np.stack(parts, 1))
            yield replace(
                batch,
                batch=torch.from_numpy(self.tables["batch"][batch.batch.numpy()]),
                labels=torch.from_numpy(self.tables["labels"][batch.labels.numpy()]),
                categorical=categorical,
            )

    def take(self, rows: np.ndarray) -> MemoryCells:
        store, schema = self.store, self.store.schema
        wanted, back = np.unique(rows, return_inverse=True)
        parts, proteins = [], []
        for start, stop in _runs(wanted):
            indptr, indices, data = store.read(start, stop)
            if self.schema.proteins and (both := store.proteins(start, stop)) is not None:
                proteins.append(both)
            parts.append(sparse.csr_matrix((data, indices, indptr), shape=(stop - start, store.n_genes)))
        counts = sparse.vstack(parts, format="csr")[back]

        def codes(column: Categories, table: str) -> np.ndarray:
            found: np.ndarray = self.tables[table][store.codes(column.name)[rows]]
            return found

        columns = Columns(
            batch=codes(schema.batch, "batch"),
            labels=codes(schema.labels[0], "labels") if self.schema.labels and schema.labels else None,
            categorical=tuple(codes(c, f"categorical_{i}") for i, c in enumerate(schema.categorical)),
            continuous=tuple(store.codes(name)[rows] for name in schema.continuous),
            size_factor=store.codes(schema.size_factor)[rows] if schema.size_factor else None,
            proteins=None if not proteins else np.concatenate([both[0] for both in proteins])[back],
            proteins_measured=None if not proteins else np.concatenate([both[1] for both in proteins])[back],
        )
        present = {self.schema.batch.values[code] for code in np.unique(columns.batch)}
        unknown = tuple(b for b in self.unknown_batches if b in present)
        return MemoryCells(self.where, counts, columns, self.schema, np.asarray(rows).astype(str), unknown)

    def column(self, name: str) -> np.ndarray:
        for column in (self.store.schema.batch, *self.store.schema.labels, *self.store.schema.categorical):
            if column.name == name:  # without reading all of obs
                values = np.array([*column.values, None], dtype=object)
                found: np.ndarray = values[self.store.codes(name)]
                return found
        return text_of(column_of(self.store.obs(), name, self.where, "groupby"))


Cells = MemoryCells | StoreCells


def cells_of(data: Any, model: AtlasModel, *, batch_key: str | None = None, layer: str | None = None) -> Cells:
    """`data` as cells of `model`.

    Args:
        data: a store or its path (streamed); an .h5ad, a .zarr or an AnnData (in memory).
        batch_key: obs column with the batch; the one that the model was trained with, where there is such.

    Raises:
        GenesError: genes that are not the model's. CategoryError: a covariate that is missing or not known.
    """
    if isinstance(data, Store):
        return _store_cells(data, model)
    if is_store(data):
        return _store_cells(open_store(data), model)
    reference = model.schema
    query = read_query(data, reference, layer=layer)
    batch = query.batch
    if batch_key is not None or reference.batch.name in query.obs.columns:
        batch = complete_text(query.obs, batch_key or reference.batch.name, query.where, "batch_key")
    known = reference.batch.extended(tuple(map(str, batch)))
    table = known.codes()
    categorical = []
    for column, values in zip(reference.categorical, query.categorical, strict=True):
        codes = column.codes()
        if surplus := sorted({str(v) for v in values if v not in codes}):
            raise _unknown(query.where, column.name, surplus)
        categorical.append(np.array([codes[v] for v in values], np.int64))
    columns = Columns(
        batch=np.array([table[str(value)] for value in batch], np.int64),
        labels=query.labels[0] if query.labels else None,
        categorical=tuple(categorical),
        continuous=tuple(query.continuous.T),
        size_factor=query.size_factor,
        proteins=query.proteins,
        proteins_measured=query.proteins_measured,
    )
    indptr, indices, counts = query.counts.indptr, query.counts.indices, query.counts.data
    matrix = sparse.csr_matrix((counts, indices, indptr), shape=(query.n_cells, reference.n_genes))
    return MemoryCells(
        where=query.where,
        counts=matrix,
        columns=columns,
        schema=replace(reference, batch=known),
        cell_names=query.obs.index.to_numpy(),
        unknown_batches=known.values[len(reference.batch) :],
        obs=query.obs,
    )


def _store_cells(store: Store, model: AtlasModel) -> StoreCells:
    schema, reference = store.schema, model.schema
    where = str(store.path)
    if schema.genes != reference.genes:
        shared = len(set(schema.genes) & set(reference.genes))
        raise GenesError(
            f"{where}: holds {schema.n_genes} genes, the model wants its {reference.n_genes} in their order ({shared} "
            "are in both); ingest the files with --genes FILE, the model's genes one a line"
        )
    if [c.name for c in schema.categorical] != [c.name for c in reference.categorical] or (
        schema.continuous != reference.continuous
    ):
        raise CategoryError(
            f"{where}: has the covariates {[c.name for c in schema.categorical] + list(schema.continuous)}, the model "
            f"wants {[c.name for c in reference.categorical] + list(reference.continuous)}"
        )
    if reference.proteins and schema.proteins not in ((), reference.proteins):
        raise GenesError(
            f"{where}: has {len(schema.proteins)} proteins, the model wants its {len(reference.proteins)} in their "
            "order, or none"
        )
    used = {schema.batch.values[code] for code in np.unique(store.codes(schema.batch.name))}
    known = reference.batch.extended(tuple(used))
    tables = {"batch": _table(schema.batch, known)}
    for i, (ours, theirs) in enumerate(zip(schema.categorical, reference.categorical, strict=True)):
        tables[f"categorical_{i}"] = _table(ours, theirs)
        codes = np.unique(store.codes(ours.name))
        if surplus := [ours.values[code] for code in codes if tables[f"categorical_{i}"][code] < 0]:
            raise _unknown(where, ours.name, surplus)
    labels = _table(schema.labels[0], reference.labels[0]) if schema.labels and reference.labels else np.empty(0, int)
    # the last entry is that of code -1
    tables["labels"] = np.append(labels, UNLABELLED) if len(labels) else np.full(schema.n_labels + 1, UNLABELLED)
    return StoreCells(store, replace(reference, batch=known), tables, known.values[len(reference.batch) :])


def refuse_unknown(cells: Cells, model: AtlasModel, *, decoding: bool) -> bool:
    """Whether the batch of these cells has any effect; if not, any code will do.

    Raises:
        CategoryError: it has, and some cells are of a batch that the model does not know.
    """
    matters = len(model.schema.batch) > 1 and (decoding or model.encodes_batch)
    if matters and cells.unknown_batches:
        shown = ", ".join(map(repr, cells.unknown_batches[:5])) + (", ..." if len(cells.unknown_batches) > 5 else "")
        raise CategoryError(
            f"{cells.where}: the model does not know the batch {shown} of column '{model.schema.batch.name}'; "
            "architecture surgery learns new batches (`scarcade map`), or choose a known one with transform_batch"
        )
    return matters


def _table(ours: Categories, theirs: Categories) -> np.ndarray:
    codes = theirs.codes()
    return np.array([codes.get(value, -1) for value in ours.values], np.int64)


def _unknown(where: str, column: str, values: Sequence[str]) -> CategoryError:
    return CategoryError(
        f"{where}: column '{column}' has values that the model does not know: {', '.join(values[:5])}; "
        "architecture surgery learns new categories (`scarcade map`)"
    )


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ascending rows as ranges [start, stop)."""
    cuts = np.flatnonzero(np.diff(rows) > 1) + 1
    for run in np.split(rows, cuts):
        yield int(run[0]), int(run[-1]) + 1
