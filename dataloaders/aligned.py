"""A store as a reference's model sees it: the model's genes in its order, its codes, its proteins; read out of core.

Nothing is written anew: gene indices are renamed while a window of cells is decoded, and codes are looked up in
tables. Values that the reference does not know stand behind its own, so that its codes never change.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from scarcade.dataloaders.gene_names import align
from scarcade.dataloaders.sources import Columns, Reading, Runs, StoreSource, check_columns
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.superbatch import Superbatch, renamed
from scarcade.engine.errors import CategoryError, GenesError
from scarcade.engine.schema import UNLABELLED, Categories, Schema

NewLabels = Literal["add", "refuse", "unlabelled"]
"""What becomes of a label that the reference does not know."""
_SHOWN = 5


@dataclass(frozen=True)
class Recoded:
    """A categorical column of a store in the codes of a reference."""

    column: str  # of the store
    table: np.ndarray  # int64: for each code of the store the reference's, and at the end that of -1

    def of(self, codes: np.ndarray) -> np.ndarray:
        """int64, of the store's codes."""
        found: np.ndarray = self.table[codes]
        return found


@dataclass(frozen=True)
class AlignedStore:
    """Cells of a store for a model. Use `aligned`."""

    store: Store
    schema: Schema  # the reference's, with the store's new values behind its own
    genes: np.ndarray | None  # int32: place of each gene of the store, -1 if not wanted; None: they are the same
    batch: Recoded
    labels: tuple[Recoded | None, ...]  # for each label column of the reference; None: the store has none
    categorical: tuple[Recoded, ...]
    proteins: np.ndarray | None  # place in the store of each protein of the reference, -1 if not there
    notes: tuple[str, ...]  # what a user should know

    @property
    def n_cells(self) -> int:
        return self.store.n_cells

    @cached_property
    def fingerprint(self) -> str:
        """Of the cells and of how they are seen."""
        return hashlib.sha256(f"{self.store.fingerprint} {self.schema.fingerprint()}".encode()).hexdigest()

    def n_before(self, fraction: float) -> int:
        """As `Store.n_before`."""
        return self.store.n_before(fraction)

    def codes(self, one: Recoded | None) -> np.ndarray:
        """Codes of all cells (n,) in one column; without the column -1."""
        if one is None:
            return np.full(self.n_cells, UNLABELLED, np.int8)
        return one.of(self.store.codes(one.column))

    def label_columns(self) -> list[tuple[Categories, np.ndarray]]:
        """Each label column of the reference with the codes of all cells."""
        return [(known, self.codes(one)) for known, one in zip(self.schema.labels, self.labels, strict=True)]

    def columns(self, rows: np.ndarray | slice = slice(None)) -> Columns:
        """What stands beside the counts of some cells, without proteins."""
        store, schema = self.store, self.schema
        return Columns(
            batch=self.codes(self.batch)[rows],
            labels=self.codes(self.labels[0])[rows] if schema.labels else None,
            categorical=tuple(self.codes(one)[rows] for one in self.categorical),
            continuous=tuple(store.codes(name)[rows] for name in schema.continuous),
            size_factor=store.codes(schema.size_factor)[rows] if schema.size_factor else None,
        )

    def source(self, reading: Reading = Reading()) -> "AlignedSource":  # noqa: B008 - frozen
        """The cells for a loader."""
        return AlignedSource(self, reading)


class AlignedSource:
    """As `StoreSource`, in the genes and codes of the reference."""

    def __init__(self, view: AlignedStore, reading: Reading) -> None:
        wants = reading.proteins and bool(view.schema.proteins)
        self._view, self._inner = view, StoreSource(view.store, replace(reading, proteins=wants))
        self.schema, self.n_cells, self.nnz = view.schema, view.n_cells, self._inner.nnz
        self.least, self.fingerprint = self._inner.least, view.fingerprint
        # wider indices are a copy beside the buffers (`renamed`)
        wider = np.iinfo(view.store.x_indices.dtype).max < self.schema.n_genes
        self.count_bytes = self._inner.count_bytes + (4 if wider else 0)
        self.columns = view.columns()
        check_columns(self.columns, self.schema, self.n_cells, view.store.where)

    def labels(self) -> np.ndarray | None:
        return self.columns.labels

    def batches(self) -> np.ndarray:
        return self.columns.batch

    def ahead(self, runs: Runs) -> None:
        self._inner.ahead(runs)

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        loaded, places = self._inner.load(runs, order), self._view.genes
        return loaded if places is None else renamed(loaded, places, self.schema.n_genes)

    def proteins(self, superbatch: Superbatch, runs: Runs) -> tuple[np.ndarray, np.ndarray] | None:
        places = self._view.proteins
        found = self._inner.proteins(superbatch, runs)
        return None if found is None or places is None else _placed(*found, places)


def aligned(
    store: Store, reference: Schema, *, min_genes: float = 0.5, new_labels: NewLabels = "unlabelled"
) -> AlignedStore:
    """`store` for a model of `reference`, of whose genes it must have a share of `min_genes` at least.

    Batches and values of further covariates that the reference does not know are added behind its own; so are labels
    with ``new_labels="add"``. Label columns are found by name, the primary one of a store also under another.

    Raises:
        GenesError: too few genes in common. CategoryError: a covariate that the store does not have, or a label that
        the reference does not know and `new_labels` refuses.
    """
    where, schema, notes = store.where, store.schema, []
    genes = None
    if schema.genes != reference.genes:
        alignment = align(schema.genes, reference.genes, where=where)
        genes = alignment.columns
        line = (
            f"{where}: {alignment.found} of the model's {reference.n_genes} genes are there ({alignment.share:.0%}); "
            f"missing are {_some(alignment.missing)}"
        )
        if alignment.share < min_genes:
            raise GenesError(
                f"{line}. Fewer than {min_genes:.0%} are not enough (min_genes); ingest the files with --genes FILE, "
                "the model's genes one a line"
            )
        if alignment.missing:
            notes.append(f"{line}, which count as zeros, though they were not measured")
    _same_numbers(schema, reference, where)
    batch, batches = _recoded(store, schema.batch, reference.batch)
    pairs = [_recoded(store, _named(schema.categorical, one, where), one) for one in reference.categorical]
    labels: list[Recoded | None] = []
    known: list[Categories] = []
    for place, ours in enumerate(reference.labels):
        theirs = next((one for one in schema.labels if one.name == ours.name), None)
        if theirs is None and place == 0 and schema.labels and schema.labels[0].name not in _names(reference.labels):
            theirs = schema.labels[0]
        if theirs is None:
            labels.append(None)
            known.append(ours)
            continue
        none = {*reference.unlabelled}.difference(ours.values)
        one, grown = _recoded(store, theirs, ours, add=new_labels == "add", none=none)
        coded = zip(theirs.values, one.table, strict=False)
        unknown = [value for value, code in coded if code == UNLABELLED and value not in none]
        if unknown and new_labels == "refuse":
            raise CategoryError(
                f"{where}: the labels of '{theirs.name}' are fixed by the model, which does not know "
                f"{_some(unknown)}; it knows {_some(ours.values)}. Ingest with --unlabelled VALUE to take such cells "
                "as unlabelled, or train a new reference with them"
            )
        if unknown:
            notes.append(unknown_labels(where, theirs.name, unknown))
        labels.append(one)
        known.append(grown)
    proteins = _protein_places(schema, reference, where)
    there = 0 if proteins is None else int((proteins >= 0).sum())
    if there < (wanted := len(reference.proteins)):
        told = f"{there} of the model's {wanted} proteins are there" if there else "has no proteins"
        notes.append(f"{where}: {told}; the model's others count as not measured")
    return AlignedStore(
        store,
        replace(
            reference,
            batch=batches,
            categorical=tuple(grown for _, grown in pairs),
            labels=tuple(known),
            counts_from=reference.counts_from,
        ),
        genes,
        batch,
        tuple(labels),
        tuple(one for one, _ in pairs),
        proteins,
        tuple(notes),
    )


def unknown_labels(where: str, column: str, values: Sequence[str]) -> str:
    """What to tell of labels that the model does not know."""
    return f"{where}: labels of '{column}' that the model does not know: {_some(values)}"


def _recoded(
    store: Store, ours: Categories, known: Categories, *, add: bool = True, none: Collection[str] = ()
) -> tuple[Recoded, Categories]:
    """The table of a column, and `known` with the values that occur behind its own, but for those that mean `none`."""
    grown = known
    if add:
        used = np.unique(store.codes(ours.name))
        grown = known.extended([ours.values[code] for code in used if code >= 0 and ours.values[code] not in none])
    codes = grown.codes()
    table = np.array([*(codes.get(value, UNLABELLED) for value in ours.values), UNLABELLED], np.int64)
    return Recoded(ours.name, table), grown


def _named(columns: Sequence[Categories], wanted: Categories, where: str) -> Categories:
    found = next((one for one in columns if one.name == wanted.name), None)
    if found is None:
        raise CategoryError(
            f"{where}: has no categorical covariate '{wanted.name}', which the model was trained with; it has "
            f"{_some(_names(columns)) or 'none'} (ingest with --categorical {wanted.name})"
        )
    return found


def _same_numbers(schema: Schema, reference: Schema, where: str) -> None:
    """Every number that the model wants of a cell is in the store."""
    if missing := [name for name in reference.continuous if name not in schema.continuous]:
        raise CategoryError(
            f"{where}: has no continuous covariate '{missing[0]}', which the model was trained with (ingest with "
            f"--continuous {missing[0]})"
        )
    if reference.size_factor is not None and schema.size_factor != reference.size_factor:
        raise CategoryError(
            f"{where}: has the size factor {schema.size_factor!r}, the model wants '{reference.size_factor}' (ingest "
            f"with --size-factor {reference.size_factor})"
        )


def _protein_places(schema: Schema, reference: Schema, where: str) -> np.ndarray | None:
    if not reference.proteins or not schema.proteins:
        return None
    there = {name: place for place, name in enumerate(schema.proteins)}
    places = np.array([there.get(name, -1) for name in reference.proteins], np.int64)
    if (places < 0).all():
        raise GenesError(
            f"{where}: none of the model's proteins is there; it has {_some(schema.proteins)}, wanted are "
            f"{_some(reference.proteins)}"
        )
    return places


def _placed(counts: np.ndarray, measured: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Proteins in the reference's order; what the store does not have was not measured."""
    there = places >= 0
    return np.where(there, counts[:, places], 0).astype(counts.dtype), measured[:, places] & there


def _names(columns: Sequence[Categories]) -> list[str]:
    return [one.name for one in columns]


def _some(values: Sequence[str]) -> str:
    return ", ".join(map(repr, values[:_SHOWN])) + (f", ... ({len(values)} in all)" if len(values) > _SHOWN else "")
