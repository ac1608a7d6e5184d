"""Writes an atlas store block by block, in memory of one block, and commits it by one rename.

What it writes is a zarr v3 AnnData group (X as CSR) in the layout of `scarcade.dataloaders.array_layout`, a
``MANIFEST.json`` with size and sha256 of every file, and ``uns["scarcade"]``: format version, seed, sources,
schema, the cells' keys and, for made data, the truth.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd

from scarcade.dataloaders.array_layout import COUNTS_PER_CHUNK, Packing
from scarcade.dataloaders.array_writer import ArrayWriter, StringWriter
from scarcade.dataloaders.elements import consolidate, write_element, write_group
from scarcade.engine import csr
from scarcade.engine.errors import CategoryError, CountsError, CsrError, GenesError, InputError, LimitError
from scarcade.engine.folder import committed
from scarcade.engine.schema import Schema

FORMAT = 1
# Bitshuffle does nothing for indices and decodes them slower. Counts that LZ4HC packed, of which only the search is
# slower, have fewer pieces: as small as with bitshuffle, and decoded in two thirds of the time.
_INDICES = Packing("shuffle")
_COUNTS = Packing("shuffle", "lz4hc", 1)
PROTEIN_COUNTS, PROTEIN_MEASURED = "protein_counts", "protein_measured"


@dataclass(frozen=True)
class CellBlock:
    """A run of n cells on its way into a store."""

    indptr: np.ndarray  # int64 (n + 1,)
    indices: np.ndarray  # gene of each count, ascending within a cell
    data: np.ndarray  # counts
    keys: np.ndarray  # uint64 (n,), ascending over the whole store
    obs: pd.DataFrame  # n rows; index: cell names; categorical columns with their final categories
    proteins: np.ndarray | None = None  # (n, P) unsigned or float32
    proteins_measured: np.ndarray | None = None  # bool (n, P)

    def __len__(self) -> int:
        return len(self.keys)


def smallest_codes(n_values: int) -> np.dtype[Any]:
    """The smallest signed type that holds the codes -1 .. n_values - 1."""
    return np.dtype(next(t for t in (np.int8, np.int16, np.int32) if n_values - 1 <= np.iinfo(t).max))


class _Column:
    """One obs column on its way to disk."""

    def __init__(self, folder: Path, name: str, like: pd.Series) -> None:
        self._name = name
        self._folder = folder
        self._categories: list[str] | None = None
        self._writer: ArrayWriter | StringWriter
        if isinstance(like.dtype, pd.CategoricalDtype):
            self._categories = [str(value) for value in like.cat.categories]
            self._ordered = bool(like.cat.ordered)
            self._writer = ArrayWriter(folder / "codes", smallest_codes(len(self._categories)))
        elif isinstance(like.dtype, np.dtype) and like.dtype.kind in "uifb" and like.dtype.itemsize <= 8:
            self._writer = ArrayWriter(folder, like.dtype)
        else:
            self._writer = StringWriter(folder)

    def append(self, values: pd.Series) -> None:
        if self._categories is not None:
            given = [str(v) for v in values.cat.categories] if isinstance(values.dtype, pd.CategoricalDtype) else None
            if given != self._categories:
                raise CategoryError(
                    f"obs column '{self._name}': its categories change between blocks; give every block the final ones"
                )
            self._writer.append(values.cat.codes.to_numpy().astype(self._writer.dtype))  # type: ignore[union-attr]
        elif isinstance(self._writer, ArrayWriter):
            if values.dtype != self._writer.dtype:
                raise CategoryError(f"obs column '{self._name}': {values.dtype} after {self._writer.dtype}")
            self._writer.append(values.to_numpy())
        else:
            strings = values.tolist()
            wrong = next((v for v in strings if not isinstance(v, str)), None)
            if wrong is not None or None in strings:
                raise CategoryError(
                    f"obs column '{self._name}': {wrong!r} among strings; make the column categorical, or all strings"
                )
            self._writer.append(strings)

    def close(self) -> None:
        self._writer.close()
        if self._categories is not None:
            categories = StringWriter(self._folder / "categories", chunk=len(self._categories))
            categories.append(self._categories)
            categories.close()
            write_group(self._folder, "categorical", "0.2.0", ordered=self._ordered)


@contextmanager
def anndata_folder(
    path: Path, finish: Callable[[], Mapping[str, Any]], *, extra: Mapping[str, Any], replace: bool
) -> Iterator[Path]:
    """A folder that becomes an AnnData at `path`, with all it needs, when the block ends without an error.

    Args:
        finish: called then: closes what the block wrote, and gives further elements by their place.
        extra: what the manifest says besides; read after `finish`.
    """
    with committed(path, extra=extra, replace=replace) as folder:
        yield folder
        elements = finish()
        write_group(folder, "anndata", "0.1.0")
        for place, value in elements.items():
            write_element(folder / place, value)
        consolidate(folder)


class StoreWriter:
    """Context manager: `append` blocks; the store is there when the block ends without an error, or not at all.

    Raises:
        StorageError: `path` exists (without `replace`), or the disk is full.
        CsrError, CountsError, CategoryError, GenesError: a block or `var` that does not fit what was declared.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        schema: Schema,
        var: pd.DataFrame,
        index_dtype: Any,
        value_dtype: Any,
        seed: int,
        sources: Sequence[Mapping[str, Any]],
        truth: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> None:
        if tuple(map(str, var.index)) != schema.genes:
            raise GenesError(f"{path}: the index of var is not the schema's genes in their order")
        self.path = Path(path)
        self._schema = schema
        self._var = var
        self._types = np.dtype(index_dtype), np.dtype(value_dtype)
        if schema.n_genes - 1 > np.iinfo(self._types[0]).max:
            raise LimitError(f"{path}: {schema.n_genes} genes do not fit into {self._types[0]}")
        self._seed = seed
        self._sources = [dict(source) for source in sources]
        self._truth = truth
        self._replace = replace
        self._extra: dict[str, Any] = {}
        self.n_cells = 0
        self.nnz = 0
        self._last_key = 0
        self._columns: dict[str, _Column] = {}
        self._proteins: tuple[ArrayWriter, ArrayWriter] | None = None

    def __enter__(self) -> Self:
        self._work = anndata_folder(self.path, self._finish, extra=self._extra, replace=self._replace)
        self._folder = self._work.__enter__()
        for name, kind, version, attributes in (
            ("X", "csr_matrix", "0.1.0", {"shape": [0, 0]}),
            *(
                (name, "dict", "0.1.0", {})
                for name in ("layers", "obsm", "obsp", "varm", "varp", "uns", "uns/scarcade")
            ),
        ):
            write_group(self._folder / name, kind, version, **attributes)
        self._indices = ArrayWriter(
            self._folder / "X" / "indices", self._types[0], chunk_rows=COUNTS_PER_CHUNK, packing=_INDICES
        )
        self._data = ArrayWriter(
            self._folder / "X" / "data", self._types[1], chunk_rows=COUNTS_PER_CHUNK, packing=_COUNTS
        )
        self._indptr = ArrayWriter(self._folder / "X" / "indptr", np.int64)
        self._indptr.append(np.zeros(1, np.int64))
        self._keys = ArrayWriter(self._folder / "uns" / "scarcade" / "keys", np.uint64)
        (self._folder / "obs").mkdir()
        self._names = StringWriter(self._folder / "obs" / "_index")
        return self

    def append(self, block: CellBlock) -> None:
        """Add the cells of `block` behind those that were added before."""
        n = len(block)
        if n == 0:
            return
        if len(block.obs) != n or len(block.indptr) != n + 1 or len(block.data) != len(block.indices):
            raise CsrError(
                f"{self.path}: a block of {n} cells with {len(block.obs)} rows of obs, "
                f"{len(block.indptr)} row pointers, {len(block.indices)} columns and {len(block.data)} values"
            )
        keys = block.keys.astype(np.uint64, copy=False)
        if int(keys[0]) < self._last_key or (keys[1:] < keys[:-1]).any():
            raise InputError(f"{self.path}: cells must come in the order of their keys")
        indptr = np.ascontiguousarray(block.indptr, np.int64)
        wrong, row = csr.check_rows(indptr, block.indices, self._schema.n_genes)
        if wrong:
            what = {
                csr.BAD_INDPTR: "row pointers that do not ascend from 0 to the number of values",
                csr.BAD_COLUMN: f"a column outside of 0 .. {self._schema.n_genes - 1}",
                csr.BAD_ORDER: "columns that are not strictly ascending",
            }[wrong]
            raise CsrError(f"{self.path}: cell '{block.obs.index[row]}' has {what}")
        self._indices.append(block.indices.astype(self._types[0], copy=False))
        self._data.append(self._fitting(block.data))
        self._indptr.append(indptr[1:] + self.nnz)
        self._keys.append(keys)
        self._append_obs(block.obs)
        self._append_proteins(block)
        self._last_key = int(keys[-1])
        self.nnz += len(block.data)
        self.n_cells += n

    def _fitting(self, values: np.ndarray) -> np.ndarray:
        wanted = self._types[1]
        if values.dtype == wanted:
            return values
        cast = values.astype(wanted)
        if not np.array_equal(cast, values):
            raise CountsError(f"{self.path}: counts up to {values.max()} ({values.dtype}) do not fit into {wanted}")
        return cast

    def _append_obs(self, obs: pd.DataFrame) -> None:
        if self.n_cells == 0:
            for name in map(str, obs.columns):
                if not name or name.startswith(("_", ".")) or "/" in name or "\0" in name or name in self._columns:
                    raise CategoryError(f"obs column '{name}': not a name that can be stored (or there twice)")
                self._columns[name] = _Column(self._folder / "obs" / name, name, obs[name])
            needed = [self._schema.batch, *self._schema.labels, *self._schema.categorical]
            size_factor = [self._schema.size_factor] if self._schema.size_factor else []
            for wanted in (*(c.name for c in needed), *self._schema.continuous, *size_factor):
                if wanted not in self._columns:
                    raise CategoryError(f"{self.path}: the schema names the obs column '{wanted}', which is not there")
        elif list(map(str, obs.columns)) != list(self._columns):
            raise CategoryError(f"{self.path}: the columns of obs change between blocks: {list(obs.columns)}")
        for name, column in self._columns.items():
            column.append(obs[name])
        self._names.append(map(str, obs.index))

    def _append_proteins(self, block: CellBlock) -> None:
        n_proteins = len(self._schema.proteins)
        if n_proteins == 0:
            return
        counts, measured = block.proteins, block.proteins_measured
        if measured is None and counts is not None:
            measured = np.ones(counts.shape, bool)
        if counts is None or measured is None or not counts.shape == measured.shape == (len(block), n_proteins):
            raise CountsError(f"{self.path}: a block of {len(block)} cells needs counts of {n_proteins} proteins")
        if self._proteins is None:
            obsm = self._folder / "obsm"
            self._proteins = (
                ArrayWriter(obsm / PROTEIN_COUNTS, counts.dtype, width=n_proteins),
                ArrayWriter(obsm / PROTEIN_MEASURED, bool, width=n_proteins),
            )
        self._proteins[0].append(counts)
        self._proteins[1].append(measured)

    def _finish(self) -> dict[str, Any]:
        """Close what was appended to; the elements that are left to write."""
        if self.n_cells == 0:
            raise InputError(f"{self.path}: no cells were given")
        for array in (self._indices, self._data, self._indptr, self._keys, *(self._proteins or ())):
            array.close()
        self._names.close()
        for column in self._columns.values():
            column.close()
        write_group(
            self._folder / "obs", "dataframe", "0.2.0", _index="_index", **{"column-order": list(self._columns)}
        )
        write_group(self._folder / "X", "csr_matrix", "0.1.0", shape=[self.n_cells, self._schema.n_genes])
        self._extra.update(
            kind="store",
            format=FORMAT,
            n_cells=self.n_cells,
            n_genes=self._schema.n_genes,
            nnz=self.nnz,
            proteins=self._proteins is not None,
        )
        ours: dict[str, Any] = {
            "format": FORMAT,
            "seed": self._seed,
            "sources": json.dumps(self._sources),
            "schema": json.dumps(self._schema.to_dict()),
        }
        if self._truth is not None:
            ours["truth"] = dict(self._truth)
        return {"var": self._var, **{f"uns/scarcade/{name}": value for name, value in ours.items()}}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._work.__exit__(kind, error, trace)
