"""Arrays of a store, written row by row in `array_layout`, without zarr."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numcodecs.vlen
import numpy as np

from scarcade.dataloaders.array_layout import (
    ABSENT,
    CHUNK_BYTES,
    CHUNKS_PER_SHARD,
    STRINGS_PER_CHUNK,
    Packing,
    metadata,
    seal,
)

_STRINGS = Packing("noshuffle")


class ArrayWriter:
    """Appends rows of one numeric type, (n,) or (n, width), to a sharded array; memory of one chunk."""

    def __init__(
        self,
        folder: Path,
        dtype: Any,
        *,
        width: int | None = None,
        chunk_rows: int | None = None,
        packing: Packing = Packing(),  # noqa: B008 - frozen
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.n = 0
        self._folder = folder
        self._row = () if width is None else (width,)
        self._attributes = dict(attributes or {"encoding-type": "array", "encoding-version": "0.2.0"})
        row_bytes = self.dtype.itemsize * max(1, width or 1)
        self._chunk = np.zeros((chunk_rows or max(1, CHUNK_BYTES // row_bytes), *self._row), self.dtype)
        self._filled = 0
        self._packing = packing
        self._index: list[tuple[int, int]] = []
        self._file: BinaryIO | None = None
        self._shards = 0
        (folder / "c").mkdir(parents=True)

    def append(self, rows: np.ndarray) -> None:
        """Rows in this array's type (anything else is a bug of the caller)."""
        if rows.dtype != self.dtype or rows.shape[1:] != self._row:
            raise TypeError(f"{self._folder}: {rows.dtype} {rows.shape} does not belong into {self.dtype} {self._row}")
        self.n += len(rows)
        start = 0
        while start < len(rows):
            if self._filled == 0 and len(rows) - start >= len(self._chunk):
                self._flush(rows[start : start + len(self._chunk)])
                start += len(self._chunk)
                continue
            take = min(len(rows) - start, len(self._chunk) - self._filled)
            self._chunk[self._filled : self._filled + take] = rows[start : start + take]
            self._filled += take
            start += take
            if self._filled == len(self._chunk):
                self._flush(self._chunk)
                self._filled = 0

    def _flush(self, chunk: np.ndarray) -> None:
        if self._file is None:
            name = self._folder / "c" / str(self._shards)
            if self._row:
                name.mkdir()
                name = name / "0"
            self._file = open(name, "wb")  # noqa: SIM115 - closed when the shard is full
        raw = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        sealed = seal(self._packing.pack(raw, self.dtype.itemsize))
        self._index.append((self._file.tell(), len(sealed)))
        self._file.write(sealed)
        if len(self._index) == CHUNKS_PER_SHARD:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is None:
            return
        index = np.full((CHUNKS_PER_SHARD, 2), ABSENT, "<u8")
        index[: len(self._index)] = self._index
        self._file.write(seal(index.tobytes()))
        self._file.close()
        self._file = None
        self._index = []
        self._shards += 1

    def close(self) -> None:
        """Write the last chunk, the last index and ``zarr.json``."""
        if self._filled:
            self._chunk[self._filled :] = 0
            self._flush(self._chunk)
        self._end_shard()
        chunk = self._chunk.shape
        shard = (chunk[0] * CHUNKS_PER_SHARD, *chunk[1:])
        endian: dict[str, Any] = {"name": "bytes"}
        if self.dtype.itemsize > 1:
            endian["configuration"] = {"endian": "little"}
        inner = [endian, self._packing.described(self.dtype.itemsize), {"name": "crc32c"}]
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {
            "name": "sharding_indexed",
            "configuration": {"chunk_shape": chunk, "codecs": inner, "index_codecs": index, "index_location": "end"},
        }
        shape = (self.n, *self._row)
        (self._folder / "zarr.json").write_bytes(metadata(shape, self.dtype.name, shard, [sharding], self._attributes))


class StringWriter:
    """Appends strings to a chunked array of them; memory of one chunk."""

    def __init__(self, folder: Path, chunk: int = STRINGS_PER_CHUNK) -> None:
        self.n = 0
        self._chunk = max(1, chunk)
        self._folder = folder
        self._pending: list[str] = []
        self._chunks = 0
        (folder / "c").mkdir(parents=True)

    def append(self, strings: Any) -> None:
        """A sequence of str."""
        self._pending.extend(strings)
        while len(self._pending) >= self._chunk:
            self._flush(self._pending[: self._chunk])
            del self._pending[: self._chunk]

    def _flush(self, strings: list[str]) -> None:
        padded = np.full(self._chunk, "", object)
        padded[: len(strings)] = strings
        encoded = numcodecs.vlen.VLenUTF8().encode(padded)
        sealed = seal(_STRINGS.pack(bytes(encoded), 1))
        (self._folder / "c" / str(self._chunks)).write_bytes(sealed)
        self._chunks += 1
        self.n += len(strings)

    def close(self) -> None:
        """Write the last chunk and ``zarr.json``."""
        if self._pending:
            self._flush(self._pending)
        codecs = [{"name": "vlen-utf8", "configuration": {}}, _STRINGS.described(1), {"name": "crc32c"}]
        attributes = {"encoding-type": "string-array", "encoding-version": "0.2.0"}
        (self._folder / "zarr.json").write_bytes(metadata((self.n,), "string", (self._chunk,), codecs, attributes))
