"""Sharded zarr v3 arrays, written and read without zarr, every byte that is read checked by its crc32c.

Zarr reads a chunk that is missing as zeros, and blosc carries no checksum. So the arrays of a store are
written by `ArrayWriter` in the one layout below, which every zarr v3 reader opens, and read by `ArrayReader`,
which knows that layout alone: shard index once, compressed runs of chunks by one positioned read, decoded
straight into the caller's buffer with the interpreter lock released (3 times zarr's own pipeline).

Layout: ``sharding_indexed`` over chunks of (bytes little, blosc with lz4 or lz4hc, crc32c), index at the end.
Files are read, not mapped: a mapped file counts as memory of the process, and a cut one kills it (SIGBUS).
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import google_crc32c
import numcodecs.vlen
import numpy as np
from numcodecs import blosc

from scarcade.engine.errors import CorruptError, CsrError, LimitError, MissingChunkError, OpenError, StorageError

blosc.use_threads = False  # we decode in threads of our own; blosc then also releases the interpreter lock

CHUNK_BYTES = 1 << 17  # of a chunk, decoded: in the second-level cache when it is checked and copied
COUNTS_PER_CHUNK = 1 << 16  # of X, the same for indices and data
CHUNKS_PER_SHARD = 256
READ_BYTES = 1 << 20  # compressed bytes read at once, at most
STRINGS_PER_CHUNK = 1 << 16
LIMIT_CHUNK_BYTES = 1 << 26  # a chunk that claims more is refused unread
_ABSENT = (1 << 64) - 1
CRC_BYTES = 4
_INDEX_BYTES = 16 * CHUNKS_PER_SHARD + CRC_BYTES  # at the end of each shard
BLOSC_HEADER = 16
_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


class Files(Protocol):
    """The one seam to storage: bytes of named files below a store."""

    where: str

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `name` from `offset` on, all of them or an error."""
        ...

    def size(self, name: str) -> int:
        """Bytes of `name`."""
        ...

    def ahead(self, name: str, offset: int, n_bytes: int) -> bool:
        """These bytes will be read soon. True: nothing else of the file needs to be asked for."""
        ...


class LocalFiles:
    """Files below a folder, held by its handle: a store that is replaced meanwhile is never read half and half."""

    def __init__(self, root: Path) -> None:
        self.where = str(root)
        try:
            self._folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise OpenError(f"{root}: not a store that can be opened ({error.strerror})") from error

    def __del__(self) -> None:
        if hasattr(self, "_folder"):
            os.close(self._folder)

    def _open(self, name: str) -> int:
        try:
            return os.open(name, os.O_RDONLY, dir_fd=self._folder)
        except FileNotFoundError as error:
            raise MissingChunkError(f"{self.where}: {name} is missing (restore the store, or ingest again)") from error
        except OSError as error:
            raise StorageError(f"{self.where}: {name} cannot be read ({error.strerror})") from error

    def ahead(self, name: str, offset: int, n_bytes: int) -> bool:
        return True  # the disk is near enough

    def size(self, name: str) -> int:
        handle = self._open(name)
        try:
            return os.fstat(handle).st_size
        finally:
            os.close(handle)

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        handle = self._open(name)
        try:
            done = 0
            while done < len(out):
                got = os.preadv(handle, [out[done:]], offset + done)
                if got == 0:
                    raise CorruptError(f"{self.where}: {name} was cut: it ends at byte {offset + done}")
                done += got
        except OSError as error:
            raise StorageError(f"{self.where}: {name} cannot be read ({error.strerror})") from error
        finally:
            os.close(handle)


def read_checked(files: Files, name: str, manifest: Mapping[str, Any]) -> bytes:
    """The whole of a small file, equal to what the manifest says.

    Raises:
        MissingChunkError: it is not there, or not in the manifest. CorruptError: other bytes.
    """
    if name not in manifest["files"]:
        raise MissingChunkError(f"{files.where}: {name} is not in the manifest")
    wanted = manifest["files"][name]
    if (size := files.size(name)) != wanted["bytes"]:
        raise CorruptError(f"{files.where}: {name} has {size} bytes where {wanted['bytes']} were written")
    content = bytearray(wanted["bytes"])
    files.read_into(name, 0, memoryview(content))
    if hashlib.sha256(content).hexdigest() != wanted["sha256"]:
        raise CorruptError(f"{files.where}: {name} is not what was written (its sha256 differs from the manifest)")
    return bytes(content)


def _metadata(shape: tuple[int, ...], dtype: str, grid: tuple[int, ...], codecs: Any, attributes: Any) -> bytes:
    meta = {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": {"string": "", "bool": False}.get(dtype, 0),
        "codecs": codecs,
        "attributes": attributes,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return json.dumps(meta, indent=1).encode()


@dataclass(frozen=True)
class Packing:
    """How blosc packs the chunks of an array. All of it is read by the one decoder of LZ4."""

    shuffle: str = "bitshuffle"
    codec: str = "lz4"
    level: int = 5

    def described(self, typesize: int) -> dict[str, Any]:
        """As zarr names it."""
        about = {"typesize": typesize, "cname": self.codec, "clevel": self.level, "shuffle": self.shuffle}
        return {"name": "blosc", "configuration": {**about, "blocksize": 0}}

    def pack(self, raw: Any, typesize: int) -> bytes:
        packed: bytes = blosc.compress(raw, self.codec.encode(), self.level, _SHUFFLES[self.shuffle], 0, typesize)
        return packed


_STRINGS = Packing("noshuffle")


def _sealed(compressed: bytes) -> bytes:
    return compressed + struct.pack("<I", google_crc32c.value(compressed))


class ArrayWriter:
    """Appends rows of one numeric type, (n,) or (n, width), to a sharded array; memory of one chunk."""

    def __init__(
        self,
        folder: Path,
        dtype: Any,
        *,
        width: int | None = None,
        chunk_rows: int | None = None,
        packing: Packing = Packing(),
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
            take = min(len(rows) - start, len(self._chunk) - self._filled)
            self._chunk[self._filled : self._filled + take] = rows[start : start + take]
            self._filled += take
            start += take
            if self._filled == len(self._chunk):
                self._flush()

    def _flush(self) -> None:
        self._chunk[self._filled :] = 0
        self._filled = 0
        if self._file is None:
            name = self._folder / "c" / str(self._shards)
            if self._row:
                name.mkdir()
                name = name / "0"
            self._file = open(name, "wb")  # noqa: SIM115 - closed when the shard is full
        raw = self._chunk.view(np.uint8).reshape(-1) if self._chunk.size else np.zeros(0, np.uint8)
        sealed = _sealed(self._packing.pack(raw, self.dtype.itemsize))
        self._index.append((self._file.tell(), len(sealed)))
        self._file.write(sealed)
        if len(self._index) == CHUNKS_PER_SHARD:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is None:
            return
        index = np.full((CHUNKS_PER_SHARD, 2), _ABSENT, "<u8")
        index[: len(self._index)] = self._index
        self._file.write(_sealed(index.tobytes()))
        self._file.close()
        self._file = None
        self._index = []
        self._shards += 1

    def close(self) -> None:
        """Write the last chunk, the last index and ``zarr.json``."""
        if self._filled:
            self._flush()
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
        (self._folder / "zarr.json").write_bytes(_metadata(shape, self.dtype.name, shard, [sharding], self._attributes))


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
        sealed = _sealed(_STRINGS.pack(bytes(encoded), 1))
        (self._folder / "c" / str(self._chunks)).write_bytes(sealed)
        self._chunks += 1
        self.n += len(strings)

    def close(self) -> None:
        """Write the last chunk and ``zarr.json``."""
        if self._pending:
            self._flush(self._pending)
        codecs = [{"name": "vlen-utf8", "configuration": {}}, _STRINGS.described(1), {"name": "crc32c"}]
        attributes = {"encoding-type": "string-array", "encoding-version": "0.2.0"}
        (self._folder / "zarr.json").write_bytes(_metadata((self.n,), "string", (self._chunk,), codecs, attributes))


def _unsealed(sealed: memoryview, where: str) -> memoryview:
    """The compressed bytes inside, their crc32c checked."""
    if len(sealed) < CRC_BYTES:
        raise CorruptError(f"{where}: cut to {len(sealed)} bytes")
    body = sealed[:-CRC_BYTES]
    if google_crc32c.value(np.frombuffer(body, np.uint8)) != int.from_bytes(sealed[-CRC_BYTES:], "little"):
        raise CorruptError(f"{where}: its checksum (crc32c) is wrong; the bytes are not those that were written")
    return body


def _decoded_bytes(compressed: memoryview, where: str) -> int:
    """What the blosc header promises; the header must speak of exactly these bytes."""
    if len(compressed) < BLOSC_HEADER:
        raise CorruptError(f"{where}: too short for a blosc chunk")
    n_bytes, _, n_compressed = struct.unpack_from("<III", compressed, 4)
    if n_compressed != len(compressed):
        raise CorruptError(f"{where}: the blosc header says {n_compressed} bytes, there are {len(compressed)}")
    return int(n_bytes)


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
        self.n_chunks = -(-self.shape[0] // rows)
        n_shards = -(-self.n_chunks // CHUNKS_PER_SHARD)
        listed = manifest["files"]
        self._sizes: list[int] = []
        for shard in range(n_shards):  # stops at the first one that is not there, however many are claimed
            if self._file(shard) not in listed:
                raise MissingChunkError(f"{files.where}: {self._file(shard)} is not in the manifest")
            self._sizes.append(int(listed[self._file(shard)]["bytes"]))
        self._indices: dict[int, np.ndarray] = {}
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
        n_bytes = _INDEX_BYTES
        if (size := self._files.size(name)) != self._sizes[shard] or size < n_bytes:
            raise CorruptError(f"{self._files.where}: {name} has {size} bytes where {self._sizes[shard]} were written")
        sealed = bytearray(n_bytes)
        self._files.read_into(name, size - n_bytes, memoryview(sealed))
        raw = np.frombuffer(_unsealed(memoryview(sealed), where), "<u8").reshape(-1, 2)
        wanted = min(CHUNKS_PER_SHARD, self.n_chunks - shard * CHUNKS_PER_SHARD)
        if (raw[:wanted] == _ABSENT).any():
            chunk = shard * CHUNKS_PER_SHARD + int(np.argmax((raw[:wanted] == _ABSENT).any(axis=1)))
            raise MissingChunkError(f"{self._files.where}: {self.name}: chunk {chunk} is missing in {name}")
        largest = self.chunk_bytes + (self.chunk_bytes >> 6) + 4096  # blosc never grows a chunk by more
        if (raw[:wanted, 1] > largest).any() or (raw[:wanted, 0] > size).any():
            raise CorruptError(f"{where}: offsets or lengths out of range")
        index = raw[:wanted].astype(np.int64)
        if (index.sum(axis=1) > size - n_bytes).any():
            raise CorruptError(f"{where}: chunks beyond the end of the file")
        self._indices[shard] = index
        return index

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

    def packed(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(bytes, int64 length of each) of the chunks [first, last) as they lie on disk, in one piece, unchecked.

        Valid in this thread until it asks this array for something else.
        """
        spans = list(self._spans(first, last))
        lengths = np.concatenate([part for _, _, part in spans])
        out = self._buffer(int(lengths.sum()))
        at = 0
        for name, begin, part in spans:
            n_bytes = int(part.sum())
            self._files.read_into(name, begin, out[at : at + n_bytes])
            at += n_bytes
        return np.frombuffer(out, np.uint8), lengths

    def ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These ranges of rows will be read soon: what is far away begins to come."""
        chunks = [(a // self.chunk_rows, -(-b // self.chunk_rows)) for a, b in ranges if a < b]
        shards = {c for a, b in chunks for c in range(a // CHUNKS_PER_SHARD, (b - 1) // CHUNKS_PER_SHARD + 1)}
        by_ranges = set()
        for shard in sorted(shards):  # all indices before anything that is found by one
            n_bytes = 0 if shard in self._indices else _INDEX_BYTES
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
        body = _unsealed(sealed, where)
        if _decoded_bytes(body, where) != self.chunk_bytes:
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
            body = _unsealed(memoryview(read_checked(self._files, name, self._manifest)), where)
            if _decoded_bytes(body, where) > LIMIT_CHUNK_BYTES:
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
