"""The columns beside a store's cells, as they were written and as codes of its schema; every byte is checked."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd

from scarcade.dataloaders.array_reader import ArrayReader, StringReader
from scarcade.dataloaders.remote import RemoteFiles
from scarcade.dataloaders.stored_files import LocalFiles, read_checked
from scarcade.dataloaders.writer import smallest_codes
from scarcade.engine.errors import CategoryError, CorruptError
from scarcade.engine.schema import Categories, Schema


class StoredObs:
    """obs of a store's cells. `where` is the store, for people."""

    def __init__(
        self, files: LocalFiles | RemoteFiles, manifest: Mapping[str, Any], schema: Schema, n_cells: int, where: str
    ) -> None:
        self._files, self._manifest, self._schema = files, manifest, schema
        self._n_cells, self._where = n_cells, where
        self._columns: WeakValueDictionary[str, np.ndarray] = WeakValueDictionary()

    def codes(self, column: str) -> np.ndarray:
        """A column for every cell (n_cells,): the schema's codes in the smallest integer type, -1 where the value
        is missing or not one of the schema's; a column without categories as float32. To be read alone: all who ask
        while somebody has it are given the same array.

        Raises:
            CategoryError: there is no such column, or a cell without a batch.
        """
        found = self._columns.get(column)
        if found is None:
            found = self._columns[column] = self._column(column)
            found.flags.writeable = False
        return found

    def names(self, start: int, stop: int) -> np.ndarray:
        """Names of the cells [start, stop), an object array of str."""
        return StringReader(self._files, "obs/_index", self._manifest).rows(start, stop)

    def frame(self, start: int, stop: int) -> pd.DataFrame:
        """The rows [start, stop) as they were written; index: the cells' names."""
        columns: dict[str, Any] = {}
        for name in self._column_names():
            if self._is_categorical(name):
                codes = ArrayReader(self._files, f"obs/{name}/codes", self._manifest).rows(start, stop)
                columns[name] = pd.Categorical.from_codes(codes, categories=pd.Index(self._categories(name)))
            else:
                meta = json.loads(read_checked(self._files, f"obs/{name}/zarr.json", self._manifest))
                kind = StringReader if meta["data_type"] == "string" else ArrayReader
                columns[name] = kind(self._files, f"obs/{name}", self._manifest).rows(start, stop)
        return pd.DataFrame(columns, index=pd.Index(self.names(start, stop).astype(str), dtype=object))

    def _column_names(self) -> list[str]:
        meta = json.loads(read_checked(self._files, "obs/zarr.json", self._manifest))
        return list(meta["attributes"]["column-order"])

    def _is_categorical(self, column: str) -> bool:
        return f"obs/{column}/codes/zarr.json" in self._manifest["files"]

    def _categories(self, column: str) -> list[str]:
        reader = StringReader(self._files, f"obs/{column}/categories", self._manifest)
        return [str(value) for value in reader.rows(0, len(reader))]

    def _column(self, column: str) -> np.ndarray:
        if not self._is_categorical(column):
            if f"obs/{column}/zarr.json" not in self._manifest["files"]:
                raise CategoryError(f"{self._where}: no obs column '{column}'; there are {self._column_names()}")
            reader = ArrayReader(self._files, f"obs/{column}", self._manifest)
            return _filled(np.empty(len(reader), np.float32), reader.pieces())
        ours = self._schema_column(column)
        stored = self._categories(column)
        values = ours.codes() if ours is not None else {value: code for code, value in enumerate(stored)}
        table = np.array([values.get(value, -1) for value in stored] + [-1], smallest_codes(len(values)))
        reader = ArrayReader(self._files, f"obs/{column}/codes", self._manifest)
        if len(reader) != self._n_cells:
            raise CorruptError(f"{self._where}: obs/{column} has {len(reader)} values for {self._n_cells} cells")

        def pieces() -> Iterator[np.ndarray]:
            for piece in reader.pieces():
                if len(piece) and (piece.min() < -1 or piece.max() >= len(stored)):
                    raise CorruptError(f"{self._where}: obs/{column} has codes beyond its {len(stored)} categories")
                yield table[piece]

        codes = _filled(np.empty(self._n_cells, table.dtype), pieces())
        if ours is not None and ours not in self._schema.labels and (codes < 0).any():
            cell = int(np.argmax(codes < 0))
            raise CategoryError(f"{self._where}: cell {cell} has no known value in '{column}'")
        return codes

    def _schema_column(self, column: str) -> Categories | None:
        columns = (self._schema.batch, *self._schema.labels, *self._schema.categorical)
        return next((c for c in columns if c.name == column), None)


def _filled(out: np.ndarray, pieces: Iterable[np.ndarray]) -> np.ndarray:
    """`out` with the pieces one behind the other: all of them are never there at once."""
    at = 0
    for piece in pieces:
        out[at : at + len(piece)] = piece
        at += len(piece)
    return out
