"""Tables of cells on their way to disk: dense arrays beside codes of obs, as AnnData, in memory of one chunk.

What is written is a zarr v3 AnnData group that `anndata.read_zarr` opens: arrays in obsm, layers or X, obs with
categorical columns and columns of numbers, var with the genes where an array has a column for each. Every byte stands
under a checksum, and the folder is committed by one rename.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from scarcade.dataloaders.array_writer import ArrayWriter, StringWriter
from scarcade.dataloaders.elements import write_group
from scarcade.dataloaders.writer import anndata_folder, smallest_codes
from scarcade.engine.errors import CategoryError
from scarcade.engine.schema import Categories

_WIDE_BYTES = 1 << 20  # of a chunk of an array with a column for each gene


class TableWriter:
    """Context manager: `append` runs of cells; the folder is there when the block ends without an error.

    Args:
        arrays: where they go: "X", "layers/NAME" (a column for each of `genes`) or "obsm/NAME".
        columns: the columns of obs and their categories; `append` gives their codes in this order.
        numbers: names of further columns of obs, which hold numbers; `append` gives them in this order.
        uns: JSON values; each is kept as text under its name.
        extra: what its manifest is to say besides.

    Raises:
        StorageError: `path` exists (without `replace`), or the disk is full.
        CategoryError: a name leads out of the folder.
    """

    def __init__(
        self,
        path: Path,
        *,
        arrays: Sequence[str],
        columns: Sequence[Categories],
        numbers: Sequence[str] = (),
        genes: Sequence[str] = (),
        uns: Mapping[str, Any],
        extra: Mapping[str, Any],
        replace: bool = False,
    ) -> None:
        self.path = Path(path)
        self.n_cells = 0
        places = (array.rpartition("/")[2] for array in arrays)
        for name in (*places, *(column.name for column in columns), *numbers):
            if not name or name.startswith((".", "_")) or "/" in name or "\0" in name:
                raise CategoryError(f"{path}: {name!r} is not a name that a column can have")
        self._wanted, self._columns, self._genes = tuple(arrays), tuple(columns), tuple(genes)
        self._number_names, self._uns, self._replace = tuple(numbers), dict(uns), replace
        self._extra: dict[str, Any] = dict(extra)
        self._arrays: dict[str, ArrayWriter] = {}

    def __enter__(self) -> Self:
        self._work = anndata_folder(self.path, self._finish, extra=self._extra, replace=self._replace)
        self._folder = self._work.__enter__()
        for name in ("obs", "obsm", "layers"):
            (self._folder / name).mkdir()
        self._names = StringWriter(self._folder / "obs" / "_index")
        self._codes = [
            ArrayWriter(self._folder / "obs" / column.name / "codes", smallest_codes(len(column)))
            for column in self._columns
        ]
        self._numbers = [ArrayWriter(self._folder / "obs" / name, np.float32) for name in self._number_names]
        return self

    def append(
        self,
        arrays: Mapping[str, np.ndarray],
        codes: Sequence[np.ndarray],
        names: Iterable[str] | None = None,
        numbers: Sequence[np.ndarray] = (),
    ) -> None:
        """Add n cells: each array (n, width), codes and numbers (n,) of each column; without names, numbered."""
        (n,) = {len(values) for values in arrays.values()}
        for name in self._wanted:
            values = np.ascontiguousarray(arrays[name], np.float32)
            if name not in self._arrays:
                wide = None if name.startswith("obsm/") else max(1, _WIDE_BYTES // (4 * max(1, values.shape[1])))
                writer = ArrayWriter(self._folder / name, np.float32, width=values.shape[1], chunk_rows=wide)
                self._arrays[name] = writer
            self._arrays[name].append(values)
        for writer, values in zip(self._codes, codes, strict=True):
            writer.append(values.astype(writer.dtype, copy=False))
        for writer, values in zip(self._numbers, numbers, strict=True):
            writer.append(values.astype(np.float32, copy=False))
        self._names.append(names if names is not None else map(str, range(self.n_cells, self.n_cells + n)))
        self.n_cells += n

    def _finish(self) -> dict[str, Any]:
        """Close what was appended to; the elements that are left to write."""
        import pandas as pd

        if not self._arrays:  # no cells: arrays of no rows are still arrays
            nothing = {
                name: np.zeros((0, len(self._genes) if not name.startswith("obsm/") else 1), np.float32)
                for name in self._wanted
            }
            no_numbers = [np.zeros(0, np.float32) for _ in self._numbers]
            self.append(nothing, [np.zeros(0, np.int8) for _ in self._columns], [], no_numbers)
        for array in (*self._arrays.values(), *self._codes, *self._numbers):
            array.close()
        self._names.close()
        for column in self._columns:
            folder = self._folder / "obs" / column.name
            categories = StringWriter(folder / "categories", chunk=len(column))
            categories.append(column.values)
            categories.close()
            write_group(folder, "categorical", "0.2.0", ordered=False)
        order = [column.name for column in self._columns]
        described = {"_index": "_index", "column-order": [*order, *self._number_names]}
        write_group(self._folder / "obs", "dataframe", "0.2.0", **described)
        for name in ("obsm", "layers"):
            write_group(self._folder / name, "dict", "0.1.0")
        self._extra.update(n_cells=self.n_cells, columns=order)
        var = pd.DataFrame(index=pd.Index(self._genes, dtype=object))
        return {"obsp": {}, "varm": {}, "varp": {}, "var": var, "uns": self._uns}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._work.__exit__(kind, error, trace)
