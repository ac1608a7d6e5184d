"""What a gene is called: symbols, Ensembl ids with and without version, and how two files' genes are matched.

CELLxGENE names genes by Ensembl id with the symbol in ``feature_name``; 10x by symbol with the id in ``gene_ids``.
Matching is by name, never by place, and only where it is unambiguous: since 2024 ``feature_name`` is not unique.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from scarcade.engine.errors import GenesError

ID_COLUMNS = (
    *("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl", "ensembl_gene_id", "feature_id"),
    *("ensemblid", "ensg"),
)
SYMBOL_COLUMNS = (
    *("feature_name", "gene_symbols", "gene_symbol", "symbol", "symbols", "gene_name", "gene_names", "gene_short_name"),
    *("hgnc_symbol", "genesymbol"),
)
_ENSEMBL = re.compile(r"^ENS[A-Z]{0,6}G\d{6,}$")
_VERSIONED = re.compile(r"^(ENS[A-Z]{0,6}G\d{6,})\.\d+$")
_SHOWN = 10


def unversioned(names: Sequence[str]) -> list[str]:
    """ENSG00000000012.3 -> ENSG00000000012; other names (also AC012345.6) as they are."""
    if not any("." in name for name in names):
        return list(names)
    return [match.group(1) if "." in name and (match := _VERSIONED.match(name)) else name for name in names]


def looks_like(names: Sequence[str]) -> str:
    """ "Ensembl ids" or "gene symbols": what most of `names` are."""
    return _looks_like(tuple(names))


@lru_cache(maxsize=16)  # the same list is asked about some ten times
def _looks_like(names: tuple[str, ...]) -> str:
    ids = sum(1 for name in names if _ENSEMBL.match(name) or _VERSIONED.match(name))
    return "Ensembl ids" if names and ids * 2 > len(names) else "gene symbols"


@dataclass(frozen=True)
class GeneNames:
    """The genes of one file under each name that the file gives them ("" where it gives none)."""

    index: tuple[str, ...]
    columns: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (column of var, names)

    @classmethod
    def of(cls, var: pd.DataFrame, where: str) -> "GeneNames":
        """The names in a file's var table, without version suffixes.

        Raises:
            GenesError: a name stands more than once in the index.
        """
        index = unversioned([str(name) for name in var.index])
        refuse_duplicates(index, where)
        columns = []
        lower = {str(column).lower(): column for column in var.columns}
        for wanted in (*ID_COLUMNS, *SYMBOL_COLUMNS):
            if wanted in lower:
                values = var[lower[wanted]]
                if isinstance(values, pd.Series):
                    text = values.astype(object).where(values.notna(), "").astype(str)
                    columns.append((str(lower[wanted]), tuple(unversioned(text.tolist()))))
        return cls(tuple(index), tuple(columns))

    def ids(self) -> tuple[str, ...] | None:
        """Ensembl ids, from the index or a column; None where the file has none."""
        for _, names in (("", self.index), *self.columns):
            if names and looks_like([name for name in names if name]) == "Ensembl ids":
                return names
        return None

    def symbols(self) -> tuple[str, ...] | None:
        """Symbols, from the index or a column of symbols; None where the file has none."""
        if looks_like(self.index) == "gene symbols":
            return self.index
        for column, names in self.columns:
            if column.lower() in SYMBOL_COLUMNS:
                return names
        return None


def refuse_duplicates(names: Sequence[str], where: str) -> None:
    """GenesError if a name stands twice."""
    repeated = pd.Index(names)
    if not repeated.is_unique:
        twice = list(dict.fromkeys(repeated[repeated.duplicated()]))
        raise GenesError(
            f"{where}: {len(twice)} gene names stand more than once: {', '.join(twice[:_SHOWN])}"
            f"{', ...' if len(twice) > _SHOWN else ''}. Name each gene once (adata.var_names_make_unique() keeps both "
            "as different genes; summing them is the other way)"
        )


@dataclass(frozen=True)
class Alignment:
    """Where the genes of a file stand among the genes that are wanted."""

    columns: np.ndarray  # int32 (genes of the file,): place among the wanted, -1 if not wanted
    found: int
    missing: tuple[str, ...]  # wanted and not measured, in the wanted order
    how: str  # for people

    @property
    def share(self) -> float:
        """Found of wanted; 1 if none is wanted."""
        wanted = self.found + len(self.missing)
        return self.found / wanted if wanted else 1.0


def align(names: GeneNames | Sequence[str], wanted: Sequence[str], *, where: str = "the query") -> Alignment:
    """The places of a file's genes among `wanted`, by whichever of its names finds most of them.

    Versions of Ensembl ids are left out of the comparison. A name of a column that stands for several genes of the
    file finds none of them.

    Raises:
        GenesError: a gene stands twice in the file's index, or none is found (with what both look like).
    """
    genes = names if isinstance(names, GeneNames) else GeneNames(tuple(unversioned(list(map(str, names)))))
    refuse_duplicates(genes.index, where)
    places = _index_of(tuple(wanted))
    if not places.is_unique:
        raise GenesError(f"the wanted genes are not unique without version suffixes: {list(wanted)[:_SHOWN]}")
    best, how, ambiguous = np.full(len(genes.index), -1, np.int32), "", 0
    for column, values in (("the index", genes.index), *((f"var[{name!r}]", given) for name, given in genes.columns)):
        own = pd.Index(values)
        columns = places.get_indexer(own).astype(np.int32)
        repeated = np.asarray(own.duplicated(keep=False)) & (columns >= 0)
        columns[repeated] = -1
        if not how or (columns >= 0).sum() > (best >= 0).sum():
            best, how, ambiguous = columns, column, len(set(own[repeated]))
    found = int((best >= 0).sum())
    absent = np.ones(len(places), bool)
    absent[best[best >= 0]] = False
    missing = tuple(np.asarray(wanted, dtype=object)[absent].tolist())
    if not found and len(wanted) and len(genes.index):
        raise GenesError(
            f"{where}: none of its {len(genes.index)} genes is among the {len(wanted)} wanted ones. "
            f"Its names look like {looks_like(genes.index)} ({', '.join(genes.index[:3])}, ...), "
            f"wanted are {looks_like(list(wanted))} "
            f"({', '.join(list(wanted)[:3])}, ...). {_advice(genes, list(wanted))}"
        )
    note = f"; {ambiguous} names that stand for several genes were left out" if ambiguous else ""
    return Alignment(best, found, missing, f"matched by {how}{note}")


@lru_cache(maxsize=4)
def _index_of(wanted: tuple[str, ...]) -> "pd.Index[str]":
    """A reference's genes are looked up for every query: their table of hashes is made once."""
    return pd.Index(unversioned(wanted))


def _advice(genes: GeneNames, wanted: list[str]) -> str:
    if looks_like(genes.index) != looks_like(wanted):
        column = "gene_ids" if looks_like(wanted) == "Ensembl ids" else "feature_name"
        return f"Put the {looks_like(wanted)} into var[{column!r}] or into the index"
    if {name.upper() for name in genes.index} & {name.upper() for name in wanted}:
        return "They differ by upper and lower case only: is it another species, or were names changed?"
    return "Is it another species or another kind of data?"


def common_names(files: Sequence[tuple[str, GeneNames]]) -> tuple[list[tuple[str, ...]], str]:
    """For each file the names under which its genes are compared with those of the others, and a word on how.

    Where all indices are of one kind they are it. Else Ensembl ids if every file has them, else symbols.

    Raises:
        GenesError: some files know only ids and others only symbols.
    """
    kinds = {where: looks_like(genes.index) for where, genes in files}
    if len(set(kinds.values())) <= 1:
        return [genes.index for _, genes in files], f"by {next(iter(kinds.values()), 'name')}"
    for read, word in ((GeneNames.ids, "Ensembl ids"), (GeneNames.symbols, "gene symbols")):
        found = [read(genes) for _, genes in files]
        if all(names is not None for names in found):
            unique = [_unambiguous(names, genes.index) for names, (_, genes) in zip(found, files, strict=True) if names]
            return unique, f"by {word} (some files name their genes otherwise, and say both)"
    lines = ", ".join(f"{where}: {kind}" for where, kind in kinds.items())
    raise GenesError(
        f"the files name their genes differently, and no var column translates: {lines}. Add var['gene_ids'] "
        "(Ensembl) or var['feature_name'] (symbols) to those that lack them"
    )


def _unambiguous(names: tuple[str, ...], index: tuple[str, ...]) -> tuple[str, ...]:
    """`names`, but the index where a name is empty or stands for several genes."""
    repeated = pd.Index(names).duplicated(keep=False)
    chosen = tuple(own if twice or not name else name for name, own, twice in zip(names, index, repeated, strict=True))
    return chosen if pd.Index(chosen).is_unique else index
