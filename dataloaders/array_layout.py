"""The one layout of the arrays of a store: sharded zarr v3, which every zarr v3 reader opens, sealed by crc32c.

Zarr reads a chunk that is missing as zeros, and blosc carries no checksum. So the arrays of a store are written by
`array_writer` in this layout, and read by `array_reader`, which knows it alone: ``sharding_indexed`` over chunks of
(bytes little, blosc with lz4 or lz4hc, crc32c), index at the end.
"""

import json
import struct
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from scarcade.engine.errors import CorruptError

blosc.use_threads = False  # we decode in threads of our own; blosc then also releases the interpreter lock

CHUNK_BYTES = 1 << 17  # of a chunk, decoded: in the second-level cache when it is checked and copied
COUNTS_PER_CHUNK = 1 << 16  # of X, the same for indices and data
CHUNKS_PER_SHARD = 256
READ_BYTES = 1 << 20  # compressed bytes read at once, at most
STRINGS_PER_CHUNK = 1 << 16
LIMIT_CHUNK_BYTES = 1 << 26  # a chunk that claims more is refused unread
ABSENT = (1 << 64) - 1
CRC_BYTES = 4
INDEX_BYTES = 16 * CHUNKS_PER_SHARD + CRC_BYTES  # at the end of each shard
BLOSC_HEADER = 16
_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def metadata(shape: tuple[int, ...], dtype: str, grid: tuple[int, ...], codecs: Any, attributes: Any) -> bytes:
    """``zarr.json`` of an array."""
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


def seal(compressed: bytes) -> bytes:
    """The bytes with their crc32c behind them."""
    return compressed + struct.pack("<I", google_crc32c.value(compressed))


def unseal(sealed: memoryview, where: str) -> memoryview:
    """The compressed bytes inside, their crc32c checked."""
    if len(sealed) < CRC_BYTES:
        raise CorruptError(f"{where}: cut to {len(sealed)} bytes")
    body = sealed[:-CRC_BYTES]
    if google_crc32c.value(np.frombuffer(body, np.uint8)) != int.from_bytes(sealed[-CRC_BYTES:], "little"):
        raise CorruptError(f"{where}: its checksum (crc32c) is wrong; the bytes are not those that were written")
    return body


def decoded_bytes(compressed: memoryview, where: str) -> int:
    """What the blosc header promises; the header must speak of exactly these bytes."""
    if len(compressed) < BLOSC_HEADER:
        raise CorruptError(f"{where}: too short for a blosc chunk")
    n_bytes, _, n_compressed = struct.unpack_from("<III", compressed, 4)
    if n_compressed != len(compressed):
        raise CorruptError(f"{where}: the blosc header says {n_compressed} bytes, there are {len(compressed)}")
    return int(n_bytes)
