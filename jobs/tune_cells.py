"""The cells on which the trials of a search are scored: the same for every trial of a store, and few.

Rows of a store lie in a random order, so its first cells are a random draw, and reading them costs the same whatever
the size of the store. Those that are scored are the first ones (at most `SCORED`, from the first tenth, which
``--data.validation`` holds out), those that labels are learnt from the last ones (at most `LEARNT`), which every trial
trains on. Of a store with labels, cells that have one are taken. Nothing of a trial's own settings has a say in it.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from scarcade.dataloaders.loader import Columns, LoaderConfig, in_memory
from scarcade.dataloaders.store import Store
from scarcade.engine.contracts import Loader
from scarcade.engine.errors import CategoryError, GenesError, UsageError
from scarcade.engine.schema import UNLABELLED, Categories, Schema

SCORED, LEARNT = 2_000, 5_000  # cells at most
SEARCHED = 20_000  # rows in which cells with a label are looked for
SHARE = 0.1  # of the store that scored cells come from
LEAST = 10  # cells that can be scored
_LEARNT_FROM = 0.5  # share of the store behind which cells to learn from lie


@dataclass(frozen=True)
class FixedCells:
    """Some cells of a store in memory, in the order of their rows, in the codes of a model."""

    rows: np.ndarray  # int64 (n,) in the store
    batches: np.ndarray  # int64 (n,)
    labels: np.ndarray | None  # int64 (n,), of the primary label column; None: the store has none
    loader: Loader

    def __len__(self) -> int:
        return len(self.rows)


def scored_cells(store: Store, schema: Schema, held_out: float) -> FixedCells:
    """The cells that are scored, for a model of `schema` in whose training a share of `held_out` is held out.

    Raises:
        UsageError: the trial would train on some of them, or there are too few. GenesError, CategoryError: the model
        is of other genes or categories than the store.
    """
    rows = scored_rows(store)
    there, wanted = store.n_before(held_out), int(rows[-1]) + 1
    if there < wanted:
        raise UsageError(
            f"--data.validation {held_out:g}: holds out {there:,} cells of {store.where}; scores are those of the "
            f"first {wanted:,}, which no trial may train on. Set it to {SHARE:g} or more, or search by elbo or loss"
        )
    return _read(store, schema, rows)


def learnt_cells(store: Store, schema: Schema, held_out: float) -> FixedCells:
    """The labelled cells that others get their labels from, for a trial as in `scored_cells`.

    Raises:
        UsageError: the trial holds out some of them, or there are none. GenesError, CategoryError: as `scored_cells`.
    """
    first = max(store.n_cells - SEARCHED, store.n_before(_LEARNT_FROM))
    if store.n_before(held_out) > first:
        raise UsageError(
            f"--data.validation {held_out:g}: labels of held-out cells are predicted from cells of the last half of "
            f"{store.where}, which every trial trains on; set it to {_LEARNT_FROM:g} or less"
        )
    rows = _usable(store, first, store.n_cells)[-LEARNT:]
    if not len(rows):
        raise UsageError(
            f"label_accuracy: none of the last {store.n_cells - first:,} cells of {store.where} has a label"
        )
    return _read(store, schema, rows)


def scored_rows(store: Store) -> np.ndarray:
    """Rows of the cells that are scored, ascending.

    Raises:
        UsageError: there are too few for any score.
    """
    searched = min(SEARCHED, store.n_before(SHARE))
    rows = _usable(store, 0, searched)[:SCORED]
    if len(rows) < LEAST:
        having = "have a label" if store.schema.labels else "are there"
        raise UsageError(
            f"{store.where}: of the first {searched:,} cells, a tenth of the store, {len(rows)} {having}; scores of "
            f"cells need {LEAST} at least. Search by elbo or loss"
        )
    return rows


def _usable(store: Store, start: int, stop: int) -> np.ndarray:
    """Rows among [start, stop) that have a label; all of them in a store without labels."""
    if not store.schema.labels:
        return np.arange(start, stop)
    column = store.schema.labels[0]
    return start + np.flatnonzero(_codes(store.obs(start, stop), column) != UNLABELLED)


def _read(store: Store, schema: Schema, rows: np.ndarray) -> FixedCells:
    """The cells at some ascending rows that lie close together, in codes of `schema`."""
    if schema.genes != store.schema.genes:
        raise GenesError(
            f"{store.where}: has other genes than the model; cells are scored where both are the same. Search by elbo "
            "or loss"
        )
    start, stop = int(rows[0]), int(rows[-1]) + 1
    indptr, indices, data = store.read(start, stop)
    chosen = rows - start
    lengths = np.diff(indptr)[chosen]
    wanted = np.zeros(stop - start, bool)
    wanted[chosen] = True
    of_counts = np.repeat(wanted, np.diff(indptr))
    counts = np.concatenate([[0], np.cumsum(lengths)]), indices[of_counts], data[of_counts]
    obs = store.obs(start, stop).iloc[chosen]
    proteins = store.proteins(start, stop) if schema.proteins == store.schema.proteins else None
    batches = _known(obs, schema.batch, store)
    # a label column of an updated model may have another name than the store's
    labels = None
    if schema.labels and store.schema.labels:
        labels = _codes(obs, Categories(store.schema.labels[0].name, schema.labels[0].values))
    columns = Columns(
        batch=batches,
        labels=labels,
        categorical=tuple(_known(obs, column, store) for column in schema.categorical),
        continuous=tuple(obs[name].to_numpy(np.float32) for name in schema.continuous),
        size_factor=obs[schema.size_factor].to_numpy(np.float32) if schema.size_factor else None,
        proteins=None if proteins is None else proteins[0][chosen],
        proteins_measured=None if proteins is None else proteins[1][chosen].astype(bool),
    )
    config = LoaderConfig(batch_size=1024, validation=0.0, read_ahead=False)
    loader = in_memory(counts, columns, schema, config, seed=0, lanes=1, shuffle=False)
    return FixedCells(rows, batches, labels, loader)


def _known(obs: pd.DataFrame, column: Categories, store: Store) -> np.ndarray:
    codes = _codes(obs, column)
    if (codes < 0).any():
        value = obs[column.name].iloc[int(np.argmax(codes < 0))]
        raise CategoryError(f"{store.where}: '{column.name}' has the value {value!r}, which the model does not know")
    return codes


def _codes(obs: pd.DataFrame, column: Categories) -> np.ndarray:
    """Codes int64 of a column of obs; -1 where a value is missing or not one of the column's."""
    stored = obs[column.name].cat
    known = column.codes()
    table = np.array([*(known.get(str(value), UNLABELLED) for value in stored.categories), UNLABELLED], np.int64)
    found: np.ndarray = table[stored.codes.to_numpy()]
    return found
