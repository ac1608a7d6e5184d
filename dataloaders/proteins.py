"""Protein counts of CITE-seq cells from obsm, with a mask of what was measured: a zero there is never made up."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scarcade.dataloaders.counts import MAX_COUNT, Place
from scarcade.dataloaders.matrix import blocks
from scarcade.dataloaders.reading import piece
from scarcade.dataloaders.schema import column_of
from scarcade.dataloaders.source import AnnDataFile, Source
from scarcade.engine.errors import CategoryError, CountsError, GenesError, OpenError, UsageError

_ROWS = 1 << 16


def spill_proteins(
    file: Source, obs: pd.DataFrame, key: str | None, measured_key: str | None, folder: Path
) -> tuple[str, ...]:
    """Write ``proteins.npy`` uint32 (cells, P) and ``measured.npy`` bool into `folder`; the proteins' names.

    A cell's protein counts as not measured where it is NaN, and where the obs column `measured_key` says so; a file
    without obsm[key] has none (an empty tuple).

    Raises:
        CountsError: values that are not counts. CategoryError: `measured_key` is not a column of yes and no.
    """
    if key is None:
        return ()
    found = protein_pieces(file, key)
    if found is None:
        return ()
    names, pieces = found
    _once(names, f"{file.where}: obsm[{key!r}]")
    said = _said(obs, measured_key, file.where)
    shape = (len(obs), len(names))
    counts = np.lib.format.open_memmap(folder / "proteins.npy", "w+", np.uint32, shape)
    measured = np.lib.format.open_memmap(folder / "measured.npy", "w+", np.bool_, shape)
    row = 0
    for values in pieces:
        here = slice(row, row + len(values))
        own = _checked(
            values, said[here, None], Place(f"{file.where}: obsm[{key!r}]", list(obs.index), names, row, "protein")
        )
        counts[here] = np.where(own, values, 0).astype(np.uint32)
        measured[here] = own
        row += len(values)
    if row != len(obs):
        raise OpenError(f"{file.where}: obsm[{key!r}] has {row} cells where obs has {len(obs)}")
    return tuple(names)


KEYS = ("protein_counts", "protein_expression", "proteins", "protein", "antibody_capture")
"""Where a query's proteins are looked for: as our stores, and the tutorials of scvi-tools, name them."""
MEASURED_KEY = "protein_measured"


def query_proteins(
    file: Source, obs: pd.DataFrame, wanted: Sequence[str], key: str | None = None
) -> tuple[np.ndarray, np.ndarray, str] | None:
    """A query's counts of the `wanted` proteins, float32 (n, P), what was measured, bool, and what to tell the user.

    A protein that the query does not have, or that is NaN, was not measured. None where the query has no proteins.

    Raises:
        UsageError: `key` is not in obsm. CountsError: not counts.
        GenesError: it has none of the wanted proteins, or a mask of what was measured that does not name them.
    """
    there_are = entries(file)
    chosen = [one for one in KEYS if one in there_are] if key is None else [key]
    if not chosen:
        return None
    if len(chosen) > 1:
        raise UsageError(f"{file.where}: proteins are in obsm under {', '.join(chosen)}; leave one of them")
    where = f"{file.where}: obsm[{chosen[0]!r}]"
    found = protein_pieces(file, chosen[0])
    if found is None:
        raise UsageError(f"{where} (--protein-key) is not there; obsm has {_listed(file)}")
    names, pieces = found
    _once(names, where)
    columns = pd.Index(names).get_indexer(pd.Index(list(wanted)))
    there = columns >= 0
    if not there.any():
        raise GenesError(
            f"{where}: has none of the model's proteins ({', '.join(wanted[:5])}, ...), but {', '.join(names[:5])}; "
            "name another entry by --protein-key, or leave proteins out to map by RNA alone"
        )
    counts = np.zeros((len(obs), len(wanted)), np.float32)
    measured = np.zeros(counts.shape, bool)
    row = 0
    for values in pieces:
        own = _checked(values, np.ones((1, 1), bool), Place(where, list(obs.index), names, row, "protein"))
        here = slice(row, row + len(values))
        counts[here, there] = np.where(own, values, 0)[:, columns[there]]
        measured[here, there] = own[:, columns[there]]
        row += len(values)
    if row != len(obs):
        raise OpenError(f"{where} has {row} cells where obs has {len(obs)}")
    if chosen[0] == KEYS[0] and (mask := _mask(file, names, len(obs))) is not None:
        measured[:, there] &= mask[:, columns[there]]
        counts[~measured] = 0
    told = f"{where}: {int(there.sum())} of the model's {len(wanted)} proteins are there"
    if n_silent := silent_cells(counts, measured):
        told += f"; {silent(n_silent)}, give NaN in place of zeros"
    return counts, measured, told


def _mask(file: Source, names: Sequence[str], n_cells: int) -> np.ndarray | None:
    """obsm["protein_measured"] as bool (n, P), its columns as `names`; an array without names has them in that order.

    Raises:
        GenesError: it does not name each of them. OpenError: it is of other cells.
    """
    found = protein_pieces(file, MEASURED_KEY)
    if found is None:
        return None
    where = f"{file.where}: obsm[{MEASURED_KEY!r}]"
    own, said = found[0], np.concatenate([np.zeros((0, len(found[0]))), *found[1]]) > 0
    _once(own, where)
    if len(said) != n_cells:
        raise OpenError(f"{where} has {len(said)} cells where obs has {n_cells}")
    order = pd.Index(own).get_indexer(pd.Index(list(names)))
    if (order < 0).any() and own == generated(len(names)):
        return said
    if (order < 0).any():
        lacking = [name for name, place in zip(names, order, strict=True) if place < 0]
        raise GenesError(
            f"{where} says nothing of {len(lacking)} of the {len(names)} proteins of obsm[{KEYS[0]!r}] "
            f"({', '.join(lacking[:5])}); give it the same columns, or leave it out and give NaN for what was not "
            "measured"
        )
    return said[:, order]


def silent_cells(counts: np.ndarray, measured: np.ndarray) -> int:
    """How many cells have proteins that were measured, several of them, and no count of any."""
    n = 0
    for start in range(0, len(counts), _ROWS):
        here = slice(start, start + _ROWS)
        n += int(((measured[here].sum(1) > 1) & ~(counts[here] > 0).any(1)).sum())
    return n


def silent(n_cells: int) -> str:
    """What to tell of them."""
    return f"{n_cells:,} cells have zeros alone, which count as measured: if they were not"


def entries(file: Source) -> list[str]:
    """Names in obsm."""
    if isinstance(file, AnnDataFile):
        return sorted(file.root["obsm"]) if "obsm" in file.root else []
    return sorted(file.adata.obsm)


def _listed(file: Source) -> str:
    return ", ".join(entries(file)[:10]) or "nothing"


def _once(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise GenesError(f"{where} names a protein twice")


def _checked(values: np.ndarray, said: np.ndarray, place: Place) -> np.ndarray:
    """Where `values` (rows, P) were measured; all those are counts.

    Raises:
        CountsError: they are not.
    """
    own: np.ndarray = np.isfinite(values) & said
    wrong = own & ~((values >= 0) & (values <= MAX_COUNT) & (values == np.floor(values)))
    wrong |= np.isinf(values) & said
    if wrong.any():
        at = np.argwhere(wrong)
        shown = ", ".join(place.at(int(r), int(c), values[r, c]) for r, c in at[:10])
        raise CountsError(
            f"{place.where}: {len(at)} values are not counts of a protein: {shown}; name the entry with raw counts by "
            "--protein-key"
        )
    return own


def protein_pieces(file: Source, key: str) -> tuple[list[str], Iterator[np.ndarray]] | None:
    """(names, float64 (rows, P) in runs of cells) of obsm[key]; None where the file has no such key."""
    if not isinstance(file, AnnDataFile):
        if key not in file.adata.obsm:
            return None
        return _from_value(file, key, file.adata.obsm[key])
    if "obsm" not in file.root or key not in file.root["obsm"]:
        return None
    node = file.root["obsm"][key]
    where = f"{file.where}: obsm[{key!r}]"
    if hasattr(node, "shape") and node.dtype.names is None:
        if len(node.shape) != 2:
            raise OpenError(f"{where}: has {len(node.shape)} axes; wanted cells x proteins")
        rows = (
            piece(node, start, min(start + _ROWS, node.shape[0]), where).astype(np.float64)
            for start in range(0, node.shape[0], _ROWS)
        )
        return _names(file, key, node.shape[1]), rows
    if dict(node.attrs).get("encoding-type") in {"csr_matrix", "csc_matrix"}:
        matrix = file.stored_matrix(f"obsm/{key}", where)
        return _names(file, key, matrix.shape[1]), (
            _dense(csr, matrix.shape[1]) for _, csr in blocks(matrix, Place(where))
        )
    return _from_value(file, key, file.element(f"obsm/{key}"))


def _from_value(file: Source, key: str, value: Any) -> tuple[list[str], Iterator[np.ndarray]]:
    try:
        if isinstance(value, pd.DataFrame):
            names, dense = [str(name) for name in value.columns], value.to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            dense = np.asarray(value.toarray() if hasattr(value, "toarray") else value, dtype=np.float64)
            names = _names(file, key, dense.shape[1])
    except (TypeError, ValueError, IndexError) as error:
        raise OpenError(f"{file.where}: obsm[{key!r}] is not a table of numbers ({error})") from error
    return names, iter([dense])


def _names(file: Source, key: str, n: int) -> list[str]:
    """Names of an array's columns from uns[key + "_names"] or uns["protein_names"], else protein_0, protein_1, ..."""
    for candidate in (f"{key}_names", "protein_names"):
        if isinstance(file, AnnDataFile):
            there = "uns" in file.root and candidate in file.root["uns"]
        else:
            there = candidate in file.adata.uns
        if there:
            values = file.element(f"uns/{candidate}") if isinstance(file, AnnDataFile) else file.adata.uns[candidate]
            if np.size(values) == n:
                return [str(one) for one in np.asarray(values).ravel()]
    return generated(n)


def generated(n: int) -> list[str]:
    """Names for the `n` columns of an array that has none."""
    return [f"protein_{i}" for i in range(n)]


def _dense(csr: Any, n: int) -> np.ndarray:
    out = np.zeros((csr.n_cells, n))
    out[np.repeat(np.arange(csr.n_cells), np.diff(csr.indptr)), csr.indices] = csr.data
    return out


def _said(obs: pd.DataFrame, key: str | None, where: str) -> np.ndarray:
    if key is None:
        return np.ones(len(obs), bool)
    column = column_of(obs, key, where, "--protein-measured-key")
    values = column.astype(str).str.strip().str.lower()
    known = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
    if not values.isin(known).all():
        odd = sorted(set(values[~values.isin(known)]))[:5]
        raise CategoryError(f"{where}: obs column {key!r} (--protein-measured-key) is not yes or no: {', '.join(odd)}")
    return values.map(known).to_numpy(bool)
