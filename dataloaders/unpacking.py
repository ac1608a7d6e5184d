"""Chunks of a store read, checked, decoded and put where their cells belong, many in one compiled call.

Called one by one from Python, the checksum, the decoder and the copying cost something in calls alone, and the
interpreter's lock is asked for each time. The compiled loops call the very functions of the C library, of numcodecs'
blosc and of google-crc32c by their addresses. Where those are not to be found the reader goes chunk by chunk, to the
same bits.
"""

# compiled with: 3df2fc921783

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from scarcade.dataloaders.array_layout import BLOSC_HEADER, CRC_BYTES
from scarcade.dataloaders.kernels import deliver
from scarcade.engine.addresses import array_at, caller


class Functions(NamedTuple):
    """Addresses of ``uint32 crc32c_value(bytes, n)``, ``int blosc_decompress_ctx(source, out, n, threads)``, and
    ``ssize_t pread(file, out, n, offset)``."""

    crc: int
    decode: int
    read: int


@cache
def functions() -> Functions | None:
    """Those of the libraries that are installed; None if one does not give them away."""
    import google_crc32c
    from numcodecs import blosc

    folder = Path(google_crc32c.__file__).parent
    try:
        decoder = ctypes.CDLL(blosc.__file__)
        (checksum,) = [ctypes.CDLL(str(one)) for one in (folder.parent / "google_crc32c.libs").glob("libcrc32c*")]
        wanted = checksum.crc32c_value, decoder.blosc_decompress_ctx, ctypes.CDLL(None).pread
        found = [ctypes.cast(one, ctypes.c_void_p).value for one in wanted]
    except (OSError, AttributeError, ValueError):
        return None
    return None if None in found else Functions(*(int(one or 0) for one in found))


crc: Any = caller(types.uint32, types.uintp, types.uintp)
"""``crc(address, (data, n))``."""
decode: Any = caller(types.int32, types.uintp, types.uintp, types.uintp, types.int32)
"""``decode(address, (source, out, n, threads))``."""
_read: Any = caller(types.intp, types.int32, types.uintp, types.uintp, types.int64)

_TOGETHER = 4  # chunks of either array that are read at once: they should still be in the cache when they are decoded


@njit(nogil=True, cache=True)
def _word(packed: np.ndarray, at: int) -> np.int64:
    """The little-endian number of four bytes that stands there."""
    total = np.int64(0)
    for k in range(4):
        total |= np.int64(packed[at + k]) << (8 * k)
    return total


@njit(nogil=True, cache=True)
def _unpacked(crc_at: int, decode_at: int, packed: np.ndarray, at: int, length: int, out: np.ndarray) -> bool:
    """Whether the sealed chunk of `length` bytes at `at` is sound and now stands in `out`."""
    body, n_bytes = length - CRC_BYTES, out.size * out.itemsize
    if body < BLOSC_HEADER or at + length > len(packed):
        return False
    if _word(packed, at + 4) != n_bytes or _word(packed, at + 12) != body:
        return False
    start = packed.ctypes.data + at
    if crc(crc_at, (np.uintp(start), np.uintp(body))) != _word(packed, at + body):
        return False
    done = decode(decode_at, (np.uintp(start), np.uintp(out.ctypes.data), np.uintp(n_bytes), np.int32(1)))
    return bool(done == n_bytes)


@njit(nogil=True, cache=True)
def _largest(values: np.ndarray) -> int:
    largest = values[0]
    for i in range(1, len(values)):
        largest = max(largest, values[np.uintp(i)])
    return largest  # type: ignore[no-any-return]


@njit(nogil=True, cache=True)
def _fetched(read_at: int, file: int, out: np.ndarray, n: int, offset: int) -> bool:
    """Whether `n` bytes of an open file from `offset` on now stand at the beginning of `out`."""
    done = 0
    while done < n:
        to = np.uintp(out.ctypes.data + done)
        got = _read(read_at, (np.int32(file), to, np.uintp(n - done), np.int64(offset + done)))
        if got <= 0:
            return False
        done += got
    return True


@njit(nogil=True, cache=True)
def _first_row(starts: np.ndarray, lengths: np.ndarray, begin: int) -> int:
    """The first of some cells, one behind the other in the file, whose counts reach beyond `begin`."""
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        if starts[middle] + lengths[middle] > begin:
            high = middle
        else:
            low = middle + 1
    return low


@njit(nogil=True, cache=True)
def take(
    crc_at: int,
    decode_at: int,
    read_at: int,
    begin: int,
    end: int,
    before_R: np.ndarray,
    first_R: np.ndarray,
    rows_R: np.ndarray,
    taken_R2: np.ndarray,
    kept_R2: np.ndarray,
    scratch_2: np.ndarray,
    files_S2: np.ndarray,
    per_shard: int,
    index_at: np.ndarray,
    index_bytes: np.ndarray,
    data_at: np.ndarray,
    data_bytes: np.ndarray,
    packed_indices: np.ndarray,
    packed_data: np.ndarray,
    size: int,
    n_genes: int,
    starts: np.ndarray,
    lengths: np.ndarray,
    places: np.ndarray,
    out_indices: np.ndarray,
    out_data: np.ndarray,
) -> int:
    """Deliver (`kernels.deliver`) what some chunks of R runs of cells hold; chunks of all runs are counted as one list.

    Args:
        begin, end: which chunks. before_R: how many there are before those of each run (R + 1,).
        first_R: each run's first chunk in the store. rows_R: where its cells begin among all cells (R + 1,).
        taken_R2: addresses of (indices, data) of a run's first chunk if it is decoded already, else 0.
        kept_R2: addresses where a run's last chunk is to be left, else 0. scratch_2: of room for a chunk.
        files_S2: open files of each shard. index_at, index_bytes, data_at, data_bytes: where each chunk lies in them.
        packed_indices, packed_data: room for chunks as they lie on disk, one of them at the least.
        size: counts of a chunk. starts: where the counts of each cell stand in the store.

    Returns:
        -1, or the first chunk (of the list) that could not be read or is damaged.
    """
    run, at = 0, begin
    while at < end:
        while before_R[run + 1] <= at:
            run += 1
        stop, number = min(end, before_R[run + 1]), first_R[run] + at - before_R[run]
        s, n, p = (
            starts[rows_R[run] : rows_R[run + 1]],
            lengths[rows_R[run] : rows_R[run + 1]],
            places[rows_R[run] : rows_R[run + 1]],
        )
        row = _first_row(s, n, number * size)
        if at == before_R[run] and taken_R2[run, 0] != 0:
            indices = array_at(taken_R2[run, 0], (size,), out_indices.dtype)
            data = array_at(taken_R2[run, 1], (size,), out_data.dtype)
            row = deliver(indices, data, number * size, row, s, n, p, out_indices, out_data)
            at, number = at + 1, number + 1
        while at < stop:
            shard, count = number // per_shard, 1
            n_index, n_data = index_bytes[number], data_bytes[number]
            while (
                count < _TOGETHER
                and at + count < stop
                and (number + count) // per_shard == shard
                and index_at[number + count] == index_at[number] + n_index
                and data_at[number + count] == data_at[number] + n_data
                and n_index + index_bytes[number + count] <= len(packed_indices)
                and n_data + data_bytes[number + count] <= len(packed_data)
            ):
                n_index += index_bytes[number + count]
                n_data += data_bytes[number + count]
                count += 1
            if not _fetched(read_at, files_S2[shard, 0], packed_indices, n_index, index_at[number]):
                return at
            if not _fetched(read_at, files_S2[shard, 1], packed_data, n_data, data_at[number]):
                return at
            n_index = n_data = 0
            for _ in range(count):
                kept = at == before_R[run + 1] - 1 and kept_R2[run, 0] != 0
                indices = array_at(kept_R2[run, 0] if kept else scratch_2[0], (size,), out_indices.dtype)
                data = array_at(kept_R2[run, 1] if kept else scratch_2[1], (size,), out_data.dtype)
                if not _unpacked(crc_at, decode_at, packed_indices, n_index, index_bytes[number], indices):
                    return at
                if not _unpacked(crc_at, decode_at, packed_data, n_data, data_bytes[number], data):
                    return at
                if _largest(indices) >= n_genes:
                    return at
                row = deliver(indices, data, number * size, row, s, n, p, out_indices, out_data)
                n_index, n_data = n_index + index_bytes[number], n_data + data_bytes[number]
                at, number = at + 1, number + 1
    return -1
