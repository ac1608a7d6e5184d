"""Chunks of a store checked, decoded and put where their cells belong, several in one compiled call.

Called one by one from Python, the checksum, the decoder and the copying cost something in calls alone, and the
interpreter's lock is asked for each time. The compiled loop calls the very functions of numcodecs' blosc and of
google-crc32c by their addresses. Where those are not to be found the reader goes chunk by chunk, to the same bits.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from scarcade.dataloaders.array_layout import BLOSC_HEADER, CRC_BYTES
from scarcade.dataloaders.kernels import deliver


class Functions(NamedTuple):
    """Addresses of ``uint32 crc32c_value(bytes, n)`` and ``int blosc_decompress_ctx(source, out, n, threads)``."""

    crc: int
    decode: int


@cache
def functions() -> Functions | None:
    """Those of the libraries that are installed; None if one does not give them away."""
    import google_crc32c
    from numcodecs import blosc

    folder = Path(google_crc32c.__file__).parent
    try:
        decoder = ctypes.CDLL(blosc.__file__)
        (checksum,) = [ctypes.CDLL(str(one)) for one in (folder.parent / "google_crc32c.libs").glob("libcrc32c*")]
        found = [
            ctypes.cast(one, ctypes.c_void_p).value for one in (checksum.crc32c_value, decoder.blosc_decompress_ctx)
        ]
    except (OSError, AttributeError, ValueError):
        return None
    return None if None in found else Functions(*(int(one or 0) for one in found))


def _calling(result: Any, arguments: tuple[Any, ...]) -> Any:
    """The code of a call of a C function by its address."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = ir.FunctionType(context.get_value_type(result), [context.get_value_type(one) for one in arguments])
        function = builder.inttoptr(given[0], kind.as_pointer())
        return builder.call(function, given[1:])

    return generate


def _crc_code(_typing: Any, address: Any, data: Any, n: Any) -> Any:
    words = (types.uintp, types.uintp)
    return types.uint32(types.uintp, *words), _calling(types.uint32, words)


def _decode_code(_typing: Any, address: Any, source: Any, out: Any, n: Any, threads: Any) -> Any:
    words = (types.uintp, types.uintp, types.uintp, types.int32)
    return types.int32(types.uintp, *words), _calling(types.int32, words)


crc: Any = intrinsic(_crc_code)
"""``crc(address, data, n)``, of unsigned words."""
decode: Any = intrinsic(_decode_code)
"""``decode(address, source, out, n, threads)``, of unsigned words and an int32."""


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
    if crc(np.uintp(crc_at), np.uintp(start), np.uintp(body)) != _word(packed, at + body):
        return False
    done = decode(np.uintp(decode_at), np.uintp(start), np.uintp(out.ctypes.data), np.uintp(n_bytes), np.int32(1))
    return bool(done == n_bytes)


@njit(nogil=True, cache=True)
def unpack(
    crc_at: int,
    decode_at: int,
    packed_indices: np.ndarray,
    index_lengths: np.ndarray,
    packed_data: np.ndarray,
    data_lengths: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    n_genes: int,
    number: int,
    row: int,
    starts: np.ndarray,
    lengths: np.ndarray,
    places: np.ndarray,
    out_indices: np.ndarray,
    out_data: np.ndarray,
) -> tuple[int, int]:
    """Deliver (`kernels.deliver`) the cells of some chunks, the first of which is `number`; of the last one the values
    are left in `indices` and `data`.

    Returns the cell to go on with, and how many chunks were delivered: fewer than there are if the next is damaged.
    """
    index_at = data_at = 0
    for k in range(len(index_lengths)):
        if not _unpacked(crc_at, decode_at, packed_indices, index_at, index_lengths[k], indices):
            return row, k
        if not _unpacked(crc_at, decode_at, packed_data, data_at, data_lengths[k], data):
            return row, k
        largest = indices[0]
        for i in range(1, len(indices)):
            largest = max(largest, indices[np.uintp(i)])
        if largest >= n_genes:
            return row, k
        row = deliver(indices, data, (number + k) * len(indices), row, starts, lengths, places, out_indices, out_data)
        index_at += index_lengths[k]
        data_at += data_lengths[k]
    return row, len(index_lengths)
