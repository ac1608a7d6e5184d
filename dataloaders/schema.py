"""Genes and categories of a file, compared with those of a store or model: what a query is before it is mapped.

A query is never guessed into place: its batches, genes and counts are found out, and every decision is told.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scarcade.dataloaders.counts import Csr, Place
from scarcade.dataloaders.gene_names import Alignment, GeneNames, align
from scarcade.dataloaders.layers import choose_layer
from scarcade.dataloaders.query_counts import Counts, Keep, held
from scarcade.dataloaders.source import Source, opened
from scarcade.dataloaders.store import is_store, open_store
from scarcade.dataloaders.unread_counts import Unread
from scarcade.engine.errors import CategoryError, GenesError, LimitError, UsageError
from scarcade.engine.schema import UNLABELLED, Categories, Schema

__all__ = ["Alignment", "DataWarning", "GeneNames", "Query", "align", "read_query", "text_of"]

FILE_COLUMN = "file"  # the obs column that holds the batch where no batch key is given
_LOOK_ALIKES = {"unknown", "unlabelled", "unlabeled", "n/a", "na", "nan", "none", "null", "unassigned", "?", "-", ""}
_MAX_VALUE = 1024  # characters
_MISSING = {"", "nan", "NaN", "None", "<NA>"}


class DataWarning(UserWarning):
    """Something about the user's data that should be seen, and that we can go on with."""


def text_of(column: pd.Series) -> np.ndarray:
    """A column's values as text (object array), None where they are missing; 1.0 and True become "1.0" and "True"."""
    if isinstance(column.dtype, pd.CategoricalDtype):  # text is made once for each category, not for each cell
        names = np.array([str(value) for value in column.cat.categories] + [None], dtype=object)
        coded: np.ndarray = names[column.cat.codes.to_numpy()]
        return coded
    out: np.ndarray = column.astype(str).to_numpy(object)
    out[column.isna().to_numpy()] = None
    return out


def label_text(column: pd.Series, unlabelled: Sequence[str]) -> np.ndarray:
    """`text_of` a label column, None also where it is empty or one of `unlabelled`."""
    text = pd.Series(text_of(column), dtype=object)
    text[text.isin({*unlabelled, *_MISSING})] = None
    return text.to_numpy(object)


def look_alikes(values: Sequence[str]) -> list[str]:
    """Those label values that read like "no label" and were not named so."""
    return sorted(value for value in values if value.strip().lower() in _LOOK_ALIKES)


def column_of(obs: pd.DataFrame, key: str, where: str, option: str) -> pd.Series:
    """An obs column.

    Raises:
        CategoryError: there is none of that name; says which there are. LimitError: a value is too long for a name.
    """
    if key not in obs.columns:
        names = ", ".join(map(str, obs.columns)) or "none"
        raise CategoryError(f"{where}: has no obs column {key!r} ({option}); it has {names}")
    column = obs[key]
    if not isinstance(column, pd.Series):
        raise CategoryError(f"{where}: has several obs columns {key!r}")
    _short_enough(column, key, where, option)
    return column


def _short_enough(column: pd.Series, key: str, where: str, option: str) -> None:
    """A value of this column becomes a name: in results, summary, report and the model itself."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.cat.categories.to_series()
    if pd.api.types.is_numeric_dtype(column.dtype) or not len(column):
        return
    longest = int(column.astype(str).str.len().max())
    if longest > _MAX_VALUE:
        raise LimitError(
            f"{where}: obs column {key!r} ({option}) has a value of {longest:,} characters; the limit is {_MAX_VALUE:,}"
        )


def complete_text(obs: pd.DataFrame, key: str, where: str, option: str) -> np.ndarray:
    """A column in which every cell must have a value.

    Raises:
        CategoryError: the column is not there or empty for some cells.
    """
    text = text_of(column_of(obs, key, where, option))
    missing = np.flatnonzero(pd.Series(text, dtype=object).isna() | pd.Series(text, dtype=object).isin({"", "nan"}))
    if len(missing):
        shown = ", ".join(repr(str(name)) for name in obs.index[missing[:10]])
        raise CategoryError(
            f"{where}: obs column {key!r} ({option}) is empty for {len(missing)} of {len(obs)} cells: {shown}"
        )
    return text


@dataclass(frozen=True)
class Query:
    """A query's checked counts in a model's gene order, with what is known of its cells."""

    name: str
    where: str
    counts: Counts  # genes that the query does not measure are absent, and listed in `alignment.missing`
    obs: pd.DataFrame  # as in the file
    batch_key: str
    batch: np.ndarray  # text (n,)
    labels: tuple[np.ndarray, ...]  # for each label column of the reference int32 (n,), UNLABELLED if not known to it
    label_text: tuple[np.ndarray, ...]  # the same as text, None where there is none: for scoring
    categorical: tuple[np.ndarray, ...]  # for each extra categorical covariate text (n,)
    continuous: np.ndarray  # float32 (n, number of continuous covariates)
    alignment: Alignment
    counts_from: str
    warnings: tuple[str, ...] = ()
    size_factor: np.ndarray | None = None
    proteins: np.ndarray | None = None  # float32 (n, proteins of the reference); None if the query has none
    proteins_measured: np.ndarray | None = None  # bool, of the same shape
    var: pd.DataFrame = field(default_factory=pd.DataFrame)
    keys: np.ndarray | None = None  # uint64 (n,), ascending: of the cells of a store of ours that are held in memory

    @property
    def n_cells(self) -> int:
        return self.counts.n_cells

    @property
    def csr(self) -> Csr:
        """The counts of a query that is held in memory."""
        if not isinstance(self.counts, Csr):
            raise TypeError(f"{self.where}: its counts are not held in memory")
        return self.counts


def read_query(
    source: Any,
    reference: Schema,
    *,
    batch_key: str | None = None,
    label_keys: Sequence[str] | None = None,
    layer: str | None = None,
    unlabelled: Sequence[str] = (),
    name: str | None = None,
    min_genes: float = 0.5,
    allow_noninteger: bool = False,
    protein_key: str | None = None,
    where: str | None = None,
    keep: Keep = held,
) -> Query:
    """The cells of an .h5ad, a .zarr or an AnnData as a reference's model wants them.

    `label_keys` name the query's columns for the reference's label columns (default: the same names, where there
    are any). Fewer than `min_genes` of the reference's genes is an error, fewer than 0.8 a warning. `protein_key` is
    the obsm entry with the counts of proteins, for a reference that has some (default: found by its usual names).
    `where` is what the file is called in messages (default: its path).
    `keep` says what becomes of the counts (see `query_counts`). Labels that mean none are those of `unlabelled`, and
    those that the reference's store was ingested with.

    Raises:
        OpenError, LimitError, CsrError, CountsError: the file cannot be used. GenesError: too few genes in common.
        CategoryError: a batch or covariate that is missing. UsageError: too many label keys.
    """
    told: list[str] = []
    with opened(source, name, where) as file:
        obs = file.obs()
        chosen = choose_layer(file, layer, integer=not allow_noninteger)
        var = file.var(chosen.name)
        genes = GeneNames.of(var, f"{file.where}: layer {chosen.name!r}")
        alignment = align(genes, reference.genes, where=file.where)
        _enough(alignment, reference, file.where, min_genes, told)
        matrix = file.matrix(chosen.name)
        place = Place(matrix.where, list(obs.index), genes.index)
        ours = Path(source) if chosen.name == "X" and is_store(source) else None
        integer = not allow_noninteger
        counts = keep(Unread(matrix, place, alignment.columns, reference.n_genes, integer, ours))
        none = (*unlabelled, *reference.unlabelled)
        labels, texts = _labels(obs, reference, label_keys, none, file.where, told)
        if batch_key is None:
            batch = np.full(len(obs), name or file.name, object)
        else:
            batch = complete_text(obs, batch_key, file.where, "--batch-key")
        proteins = _proteins(file, obs, reference, protein_key, told)
        return Query(
            name=name or file.name,
            where=file.where,
            counts=counts,
            obs=obs,
            batch_key=batch_key or FILE_COLUMN,
            batch=batch,
            labels=labels,
            label_text=texts,
            categorical=tuple(
                complete_text(obs, one.name, file.where, "a covariate of the model") for one in reference.categorical
            ),
            continuous=numbers(obs, reference.continuous, file.where),
            size_factor=numbers(obs, [reference.size_factor], file.where)[:, 0] if reference.size_factor else None,
            alignment=alignment,
            counts_from=chosen.name,
            proteins=proteins[0],
            proteins_measured=proteins[1],
            warnings=tuple(told),
            var=var,
            keys=open_store(ours).keys(0, len(obs)) if ours is not None and isinstance(counts, Csr) else None,
        )


def _proteins(
    file: Source, obs: pd.DataFrame, reference: Schema, key: str | None, told: list[str]
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    if not reference.proteins:
        return None, None
    from scarcade.dataloaders.proteins import entries, query_proteins  # which stands on this file

    found = query_proteins(file, obs, reference.proteins, key)
    if found is None:
        others = ", ".join(entries(file)[:5])
        hint = f" (--protein-key names them, if they are one of obsm's {others})" if others else ""
        told.append(f"{file.where}: has no proteins{hint}; those of the reference count as not measured")
        return None, None
    told.append(found[2])
    return found[0], found[1]


def numbers(obs: pd.DataFrame, keys: Sequence[str], where: str) -> np.ndarray:
    """Columns as float32 (n, len(keys)).

    Raises:
        CategoryError: a column is missing, not numbers, or not finite.
    """
    out = np.empty((len(obs), len(keys)), np.float32)
    for i, key in enumerate(keys):
        column = column_of(obs, key, where, "a continuous covariate")
        try:
            out[:, i] = column.astype(np.float64)
        except (ValueError, TypeError) as error:
            raise CategoryError(f"{where}: obs column {key!r} is not numbers ({error})") from error
        if not np.isfinite(out[:, i]).all():
            raise CategoryError(f"{where}: obs column {key!r} is missing or not finite for some cells")
    return out


def _enough(alignment: Alignment, reference: Schema, where: str, least: float, told: list[str]) -> None:
    share = alignment.share
    missing = ", ".join(alignment.missing[:5]) + (", ..." if len(alignment.missing) > 5 else "")
    line = f"{where}: {alignment.found} of the reference's {reference.n_genes} genes are there ({share:.0%})"
    if share < least:
        raise GenesError(f"{line}, {alignment.how}: fewer than {least:.0%} (--min-genes). Missing: {missing}")
    if alignment.missing:
        text = f"{line}; the other {len(alignment.missing)} count as zeros, though they were not measured: {missing}"
        told.append(text)
        if share < 0.8:
            warnings.warn(text, DataWarning, stacklevel=3)


def _labels(
    obs: pd.DataFrame,
    reference: Schema,
    keys: Sequence[str] | None,
    unlabelled: Sequence[str],
    where: str,
    told: list[str],
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    if keys is not None and len(keys) > len(reference.labels):
        raise UsageError(
            f"--label-key was given {len(keys)} times, but the reference has {len(reference.labels)} label columns"
        )
    codes, texts = [], []
    for i, known in enumerate(reference.labels):
        given = keys[i] if keys is not None and i < len(keys) else None
        if given is None and (known.name not in obs.columns or keys is not None):
            text = np.full(len(obs), None, object)
        else:
            text = label_text(column_of(obs, given or known.name, where, "--label-key"), unlabelled)
        code = code_of(text, known)
        unseen = sorted({str(value) for value in text[(code == UNLABELLED) & (text != None)]})  # noqa: E711
        if unseen:
            told.append(
                f"{where}: {len(unseen)} values of {given or known.name!r} are not in the reference and count as "
                f"unlabelled: {', '.join(unseen[:10])}{', ...' if len(unseen) > 10 else ''}"
            )
        codes.append(code)
        texts.append(text)
    return tuple(codes), tuple(texts)


def code_of(text: np.ndarray, known: Categories) -> np.ndarray:
    """int32 codes of text values, -1 where missing or not known."""
    return pd.Categorical(text, categories=list(known.values)).codes.astype(np.int32)
