"""What many surveyed files have in common: one list of genes, one set of categories, one table of cells.

All of it is a function of the set of files, not of their order or of how they were grouped, so that a store that
grew by an append is the store of one ingest of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from scarcade.dataloaders.gene_names import align, common_names, looks_like
from scarcade.dataloaders.schema import text_of
from scarcade.dataloaders.shuffle import Bucket
from scarcade.dataloaders.survey import Column, IngestConfig, Survey
from scarcade.engine.errors import GenesError

_MISSING_TEXT = {"nan", "None", "<NA>", ""}


@dataclass(frozen=True)
class GenePlan:
    """The genes of the store before any selection by variance, and each file's place for its own genes."""

    genes: tuple[str, ...]
    columns: tuple[np.ndarray, ...]  # for each file int32 (its genes,): place in `genes`, -1 if left out
    unmeasured: tuple[int, ...]  # for each file how many of `genes` it does not have
    how: str


def plan_genes(surveys: Sequence[Survey], wanted: str | Sequence[str]) -> GenePlan:
    """The union or intersection of the files' genes (their own order where all agree, else sorted), or a list.

    Raises:
        GenesError: nothing in common, or names that cannot be compared.
    """
    if not isinstance(wanted, str):
        found = [align(one.genes, wanted, where=one.where) for one in surveys]
        return GenePlan(
            tuple(wanted), tuple(one.columns for one in found), tuple(len(one.missing) for one in found), found[0].how
        )
    names, how = common_names([(one.where, one.genes) for one in surveys])
    if all(own == names[0] for own in names):
        genes = names[0]
    elif wanted == "union":
        genes = tuple(sorted(set().union(*names)))
    else:
        genes = tuple(sorted(set(names[0]).intersection(*names[1:])))
    if not genes:
        kinds = "; ".join(
            f"{one.where}: {looks_like(own)} ({', '.join(own[:3])}, ...)"
            for one, own in zip(surveys, names, strict=True)
        )
        raise GenesError(f"the files have no gene in common: {kinds}")
    index = pd.Index(genes)
    columns = tuple(index.get_indexer(pd.Index(own)).astype(np.int32) for own in names)
    return GenePlan(genes, columns, tuple(len(genes) - int((own >= 0).sum()) for own in columns), how)


def gene_table(surveys: Sequence[Survey], plan: GenePlan) -> pd.DataFrame:
    """var of the store: Ensembl ids and symbols where some file says them (the first by name where files disagree)."""
    table = pd.DataFrame(index=pd.Index(list(plan.genes), dtype=object))
    for name, wanted in (("gene_id", "Ensembl ids"), ("gene_symbol", "gene symbols")):
        known = np.full(len(plan.genes), "", object)
        for one, columns in zip(surveys, plan.columns, strict=True):
            values = one.genes.ids() if wanted == "Ensembl ids" else one.genes.symbols()
            if values is None:
                continue
            kept = columns >= 0
            own = np.asarray(values, dtype=object)[kept]
            before = known[columns[kept]]
            better = (own != "") & ((before == "") | (own < before))
            known[columns[kept]] = np.where(better, own, before)
        if (known != "").any() and not (known == np.asarray(plan.genes, dtype=object)).all():
            table[name] = known
    return table


@dataclass(frozen=True)
class ObsColumn:
    """One column of the store's obs: how each file's values become it."""

    name: str
    kind: str  # "text" (categorical), "names", "bool", "int" or "float"
    sources: tuple[Column, ...]  # one for each file
    categories: tuple[str, ...] = ()

    def values(self, surveys: Sequence[Survey], bucket: Bucket) -> "pd.Categorical | np.ndarray":
        n = len(bucket.row)
        if self.kind == "text":
            codes = np.full(n, -1, np.int32)
            for mine, survey, column in self._files(surveys, bucket):
                codes[mine] = self._codes(survey, column, bucket.row[mine])
            return pd.Categorical.from_codes(codes, categories=pd.Index(list(self.categories), dtype=object))
        if self.kind == "names":
            text = np.full(n, "", object)
            for mine, survey, column in self._files(surveys, bucket):
                text[mine] = self._text(survey, column, bucket.row[mine])
            return text
        out: np.ndarray = np.empty(n, {"bool": np.bool_, "int": np.int64, "float": np.float64}[self.kind])
        for mine, survey, column in self._files(surveys, bucket):
            out[mine] = _array(survey, f"column-{column.place}")[bucket.row[mine]]
        return out

    def _files(self, surveys: Sequence[Survey], bucket: Bucket) -> "list[tuple[np.ndarray, Survey, Column]]":
        there = [(bucket.source == s, survey, self.sources[s]) for s, survey in enumerate(surveys)]
        return [(mine, survey, column) for mine, survey, column in there if mine.any()]

    def _codes(self, survey: Survey, column: Column, rows: np.ndarray) -> np.ndarray:
        values = _array(survey, f"column-{column.place}")[rows]
        if column.kind == "text":
            return np.asarray(_new_codes(column.categories, self.categories)[values], np.int32)
        final = pd.Index(list(self.categories), dtype=object)
        return np.asarray(final.get_indexer(pd.Index(_as_text(values), dtype=object)), np.int32)

    def _text(self, survey: Survey, column: Column, rows: np.ndarray) -> np.ndarray:
        values = _array(survey, f"column-{column.place}")[rows]
        if column.kind == "names":
            return np.asarray(np.char.decode(values, "utf-8"), dtype=object)
        if column.kind == "text":
            return np.asarray(np.append(np.asarray(column.categories, dtype=object), "")[values], dtype=object)
        return np.array(["" if one in _MISSING_TEXT else one for one in _as_text(values)], dtype=object)


def plan_obs(surveys: Sequence[Survey], config: IngestConfig) -> tuple[list[ObsColumn], list[str]]:
    """The columns that all files share, those of the schema first; and the names of the others."""
    shared = set(surveys[0].columns).intersection(*(one.columns for one in surveys[1:]))
    first = list(dict.fromkeys(config.needed()))
    order = first + sorted(shared - set(first))
    out = []
    for name in order:
        own = tuple(one.columns[name] for one in surveys)
        kinds = {column.kind for column in own}
        if kinds <= {"int", "float"}:
            out.append(ObsColumn(name, "float" if "float" in kinds else "int", own))
        elif kinds == {"bool"}:
            out.append(ObsColumn(name, "bool", own))
        elif "names" in kinds:
            out.append(ObsColumn(name, "names", own))
        else:
            categories: set[str] = set()
            for survey, column in zip(surveys, own, strict=True):
                categories |= set(column.categories if column.kind == "text" else _distinct(survey, column))
            out.append(ObsColumn(name, "text", own, tuple(sorted(categories - _MISSING_TEXT))))
    others = sorted({name for one in surveys for name in one.columns} - shared - set(first))
    return out, others


def _distinct(survey: Survey, column: Column) -> list[str]:
    return _as_text(np.unique(_array(survey, f"column-{column.place}")))


def _as_text(values: np.ndarray) -> list[str]:
    return [str(one) for one in text_of(pd.Series(values))]


def plan_proteins(surveys: Sequence[Survey]) -> tuple[str, ...]:
    """All proteins of all files: their own order where all that have some agree, else sorted."""
    lists = [one.proteins for one in surveys if one.proteins]
    if not lists:
        return ()
    return lists[0] if all(own == lists[0] for own in lists) else tuple(sorted(set().union(*lists)))


def protein_values(surveys: Sequence[Survey], proteins: Sequence[str], bucket: Bucket) -> tuple[np.ndarray, np.ndarray]:
    """(counts uint32, measured) of a bucket's cells, each (n, P)."""
    counts = np.zeros((len(bucket.row), len(proteins)), np.uint32)
    measured = np.zeros(counts.shape, bool)
    final = pd.Index(list(proteins))
    for s, survey in enumerate(surveys):
        mine = np.flatnonzero(bucket.source == s)
        if not survey.proteins or not len(mine):
            continue
        places = final.get_indexer(pd.Index(list(survey.proteins)))
        rows = bucket.row[mine]
        counts[mine[:, None], places] = _array(survey, "proteins")[rows]
        measured[mine[:, None], places] = _array(survey, "measured")[rows]
    return counts, measured


def cell_names(surveys: Sequence[Survey], bucket: Bucket) -> pd.Index:
    """The names of a bucket's cells."""
    out = np.full(len(bucket.row), "", object)
    for s, survey in enumerate(surveys):
        mine = bucket.source == s
        if mine.any():
            out[mine] = np.char.decode(_array(survey, "names")[bucket.row[mine]], "utf-8")
    names: pd.Index = pd.Index(out, dtype=object)
    return names


@lru_cache(maxsize=1024)
def _new_codes(own: tuple[str, ...], final: tuple[str, ...]) -> np.ndarray:
    """The code among `final` of each category in `own`; of "none", -1, which stands last."""
    codes = pd.Index(list(final), dtype=object).get_indexer(pd.Index(list(own), dtype=object))
    return np.append(codes, -1)


def _array(survey: Survey, name: str) -> np.ndarray:
    return _mapped(survey.folder / f"{name}.npy")


@lru_cache(maxsize=4096)
def _mapped(path: Path) -> np.ndarray:
    """Opened once: a column is asked for by every bucket."""
    values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return values


def forget() -> None:
    """Let go of the files that were put aside: what is still mapped takes its room when it is deleted."""
    _mapped.cache_clear()
