"""Arrays of a store, read without zarr, every byte of them checked by its crc32c.

A shard's index is read once, runs of compressed chunks by one positioned read each, and chunks are decoded straight
into the caller's buffer with the interpreter lock released.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numcodecs.vlen
import numpy as np
from numcodecs import blosc

from scarcade.dataloaders.array_layout import (
    ABSENT,
    CHUNKS_PER_SHARD,
    INDEX_BYTES,
    LIMIT_CHUNK_BYTES,
    READ_BYTES,
    decoded_bytes,
    unseal,
)
from scarcade.dataloaders.stored_files import Files, read_checked
from scarcade.engine.errors import CorruptError, CsrError, LimitError, MissingChunkError


class ArrayReader:
    """Rows of an array that `ArrayWriter` wrote. Safe to use from several threads."""

    def __init__(self, files: Files, name: str, manifest: Mapping[str, Any]) -> None:
        self.name = name
        self._files = files
        try:
            meta = json.loads(read_checked(files, f"{name}/zarr.json", manifest))
            self.shape = tuple(int(n) for n in meta["shape"])
            self.dtype = np.dtype(str(meta["data_type"])).newbyteorder("<")
            (sharding,) = meta["codecs"]
            self._chunk_shape = tuple(int(n) for n in sharding["configuration"]["chunk_shape"])
            grid = tuple(int(n) for n in meta["chunk_grid"]["configuration"]["chunk_shape"])
            names = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{files.where}: {name}/zarr.json is not of our making ({error!r})") from error
        rows, *rest = self._chunk_shape
        if (
            sharding["name"] != "sharding_indexed"
            or sharding["configuration"]["index_location"] != "end"
            or names != ["bytes", "blosc", "crc32c"]
            or self.dtype.kind not in "uifb"
            or len(self.shape) not in (1, 2)
            or min(self.shape) < 0
            or rows < 1
            or tuple(rest) != self.shape[1:]
            or grid != (rows * CHUNKS_PER_SHARD, *rest)
        ):
            raise CorruptError(f"{files.where}: {name}/zarr.json describes an array that is not of our making")
        self.chunk_rows = rows
        self.width = rest[0] if rest else 1
        self.chunk_bytes = rows * self.width * self.dtype.itemsize
        if self.chunk_bytes > LIMIT_CHUNK_BYTES:
            raise LimitError(f"{files.where}: {name} has chunks of {self.chunk_bytes} bytes (> {LIMIT_CHUNK_BYTES})")
        self.largest = self.chunk_bytes + (self.chunk_bytes >> 6) + 4096  # bytes on disk: blosc never adds more
        self.n_chunks = -(-self.shape[0] // rows)
        n_shards = -(-self.n_chunks // CHUNKS_PER_SHARD)
        listed = manifest["files"]
        self._sizes: list[int] = []
        for shard in range(n_shards):  # stops at the first one that is not there, however many are claimed
            if self._file(shard) not in listed:
                raise MissingChunkError(f"{files.where}: {self._file(shard)} is not in the manifest")
            self._sizes.append(int(listed[self._file(shard)]["bytes"]))
        self._indices: dict[int, np.ndarray] = {}
        self._table = np.zeros((2, self.n_chunks), np.int64)
        self._tabled: set[int] = set()
        self._scratch = threading.local()

    def __len__(self) -> int:
        return self.shape[0]

    def _file(self, shard: int) -> str:
        return f"{self.name}/c/{shard}" + ("/0" if len(self.shape) == 2 else "")

    def _index(self, shard: int) -> np.ndarray:
        """int64 (chunks of a shard, 2): offset and length of each; read once and checked."""
        found = self._indices.get(shard)
        if found is not None:
            return found
        name = self._file(shard)
        where = f"{self._files.where}: {name}: shard index"
        n_bytes = INDEX_BYTES
        if (size := self._files.size(name)) != self._sizes[shard] or size < n_bytes:
            raise CorruptError(f"{self._files.where}: {name} has {size} bytes where {self._sizes[shard]} were written")
        sealed = bytearray(n_bytes)
        self._files.read_into(name, size - n_bytes, memoryview(sealed))
        raw = np.frombuffer(unseal(memoryview(sealed), where), "<u8").reshape(-1, 2)
        wanted = min(CHUNKS_PER_SHARD, self.n_chunks - shard * CHUNKS_PER_SHARD)
        if (raw[:wanted] == ABSENT).any():
            chunk = shard * CHUNKS_PER_SHARD + int(np.argmax((raw[:wanted] == ABSENT).any(axis=1)))
            raise MissingChunkError(f"{self._files.where}: {self.name}: chunk {chunk} is missing in {name}")
        if (raw[:wanted, 1] > self.largest).any() or (raw[:wanted, 0] > size).any():
            raise CorruptError(f"{where}: offsets or lengths out of range")
        index = raw[:wanted].astype(np.int64)
        if (index.sum(axis=1) > size - n_bytes).any():
            raise CorruptError(f"{where}: chunks beyond the end of the file")
        self._indices[shard] = index
        return index

    def shards(self, ranges: Sequence[tuple[int, int]]) -> set[int]:
        """Those that hold some ranges of chunks."""
        return {s for a, b in ranges if a < b for s in range(a // CHUNKS_PER_SHARD, (b - 1) // CHUNKS_PER_SHARD + 1)}

    def table(self, shards: Iterable[int]) -> np.ndarray:
        """int64 (2, n_chunks): where each chunk begins in its file, and its bytes; known of these shards, at least.

        Raises:
            MissingChunkError, CorruptError: an index that is not what was written.
        """
        for shard in shards:
            if shard not in self._tabled:
                index, first = self._index(shard), shard * CHUNKS_PER_SHARD
                self._table[:, first : first + len(index)] = index.T
                self._tabled.add(shard)  # not before: another thread may look
        return self._table

    def handle(self, shard: int) -> int | None:
        """The file of a shard, opened to be read; None if it is not on a disk of this machine."""
        return self._files.handle(self._file(shard))

    def _buffer(self, n_bytes: int) -> memoryview:
        """A buffer of this thread for compressed bytes, reused."""
        have = getattr(self._scratch, "bytes", None)
        if have is None or len(have) < n_bytes:
            have = self._scratch.bytes = memoryview(bytearray(n_bytes + (n_bytes >> 2)))
        return have[:n_bytes]

    def _spans(self, first: int, last: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """The chunks [first, last) as (file, offset, length of each chunk) of runs of at most `READ_BYTES`."""
        if not 0 <= first <= last <= self.n_chunks:
            raise IndexError(f"{self.name}: chunks {first} to {last} of {self.n_chunks}")
        chunk = first
        while chunk < last:
            shard, inside = divmod(chunk, CHUNKS_PER_SHARD)
            index = self._index(shard)
            part = index[inside : inside + last - chunk]
            ends = part.sum(axis=1)
            begin = int(part[0, 0])
            count = max(1, int(np.searchsorted(ends, begin + READ_BYTES, side="right")))
            gaps = np.flatnonzero(part[1:count, 0] != ends[: count - 1])
            if len(gaps):
                count = int(gaps[0]) + 1
            yield self._file(shard), begin, part[:count, 1]
            chunk += count

    def _sealed(self, first: int, last: int) -> Iterator[tuple[int, memoryview]]:
        """The chunks [first, last) as they lie on disk, valid until the next one; read in runs of `READ_BYTES`."""
        chunk = first
        for name, begin, lengths in self._spans(first, last):
            run = self._buffer(int(lengths.sum()))
            self._files.read_into(name, begin, run)
            position = 0
            for length in lengths.tolist():
                yield chunk, run[position : position + length]
                position += length
                chunk += 1

    def ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These ranges of rows will be read soon: what is far away begins to come."""
        chunks = [(a // self.chunk_rows, -(-b // self.chunk_rows)) for a, b in ranges if a < b]
        by_ranges = set()
        for shard in sorted(self.shards(chunks)):  # all indices before anything that is found by one
            n_bytes = 0 if shard in self._indices else INDEX_BYTES
            if not self._files.ahead(self._file(shard), self._sizes[shard] - n_bytes, n_bytes):
                by_ranges.add(shard)
        for first, last in chunks:
            if by_ranges.issuperset(range(first // CHUNKS_PER_SHARD, (last - 1) // CHUNKS_PER_SHARD + 1)):
                for name, begin, lengths in self._spans(first, last):
                    self._files.ahead(name, begin, int(lengths.sum()))

    def _where(self, chunk: int) -> str:
        return f"{self._files.where}: {self.name}: chunk {chunk} (in {self._file(chunk // CHUNKS_PER_SHARD)})"

    def _unpack(self, chunk: int, sealed: memoryview, out: np.ndarray) -> None:
        """Check one chunk and decode it into `out`, which are its bytes."""
        where = self._where(chunk)
        body = unseal(sealed, where)
        if decoded_bytes(body, where) != self.chunk_bytes:
            raise CorruptError(f"{where}: does not hold {self.chunk_bytes} bytes")
        try:
            blosc.decompress(body, out)
        except (RuntimeError, ValueError) as error:
            raise CorruptError(f"{where}: blosc cannot decode it ({error})") from error

    def each(self, first: int, last: int, out: np.ndarray, below: int | None = None) -> Iterator[int]:
        """Decode the chunks [first, last) one after the other into `out` (of one chunk); yields their numbers.

        Raises:
            CsrError: a value that is not `below`.
            MissingChunkError, CorruptError: naming store, array, shard and chunk. Nothing else is raised for
            bytes that were changed on disk.
        """
        raw = out.view(np.uint8).reshape(-1)
        for chunk, sealed in self._sealed(first, last):
            self._unpack(chunk, sealed, raw)
            if below is not None and int(out.max()) >= below:
                raise CsrError(f"{self._where(chunk)}: a column index that is not below the {below} genes")
            yield chunk

    def decode(self, first: int, last: int, out: np.ndarray) -> None:
        """Decode the chunks [first, last) one behind the other into `out` (contiguous, of this dtype).

        Raises:
            as `each`.
        """
        if len(out) != (last - first) * self.chunk_rows:
            raise IndexError(f"{self.name}: {last - first} chunks into {len(out)} rows")
        raw = out.view(np.uint8).reshape(-1)
        for chunk, sealed in self._sealed(first, last):
            at = (chunk - first) * self.chunk_bytes
            self._unpack(chunk, sealed, raw[at : at + self.chunk_bytes])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) in the machine's byte order: (stop - start,) or (stop - start, width)."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.name}: rows {start} to {stop} of {len(self)}")
        first, last = start // self.chunk_rows, -(-stop // self.chunk_rows)
        if start == stop:
            return np.zeros((0, *self.shape[1:]), self.dtype.newbyteorder("="))
        out = np.empty(((last - first) * self.chunk_rows, *self.shape[1:]), self.dtype)
        if out.size:
            self.decode(first, last, out)
        at = start - first * self.chunk_rows
        return out[at : at + stop - start].astype(self.dtype.newbyteorder("="), copy=False)

    def pieces(self, rows: int = 1 << 20) -> Iterator[np.ndarray]:
        """All rows, at most `rows` at a time."""
        for start in range(0, len(self), rows):
            yield self.rows(start, min(start + rows, len(self)))


class StringReader:
    """Strings that `StringWriter` wrote."""

    def __init__(self, files: Files, name: str, manifest: Mapping[str, Any]) -> None:
        self.name = name
        self._files = files
        self._manifest = manifest
        try:
            meta = json.loads(read_checked(files, f"{name}/zarr.json", manifest))
            (self._n,) = (int(n) for n in meta["shape"])
            (self._step,) = (int(n) for n in meta["chunk_grid"]["configuration"]["chunk_shape"])
            names = [codec["name"] for codec in meta["codecs"]]
            if names != ["vlen-utf8", "blosc", "crc32c"] or self._step < 1 or self._n < 0:
                raise ValueError(names)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{files.where}: {name}/zarr.json is not of our making ({error!r})") from error

    def __len__(self) -> int:
        return self._n

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Strings [start, stop) as an object array."""
        if not 0 <= start <= stop <= self._n:
            raise IndexError(f"{self.name}: rows {start} to {stop} of {self._n}")
        parts = []
        for chunk in range(start // self._step, -(-stop // self._step)):
            name = f"{self.name}/c/{chunk}"
            where = f"{self._files.where}: {name}"
            body = unseal(memoryview(read_checked(self._files, name, self._manifest)), where)
            if decoded_bytes(body, where) > LIMIT_CHUNK_BYTES:
                raise LimitError(f"{where}: more than {LIMIT_CHUNK_BYTES} bytes of strings in a chunk")
            try:
                strings = numcodecs.vlen.VLenUTF8().decode(blosc.decompress(body))
            except (RuntimeError, ValueError) as error:
                raise CorruptError(f"{where}: cannot be decoded ({error})") from error
            low = chunk * self._step
            if len(strings) != self._step:
                raise CorruptError(f"{where}: holds {len(strings)} strings where {self._step} were written")
            parts.append(strings[max(0, start - low) : stop - low])
        return np.concatenate(parts) if parts else np.zeros(0, object)
