"""Refuses files from their metadata alone: sizes that no real file has, codecs that run code, ways out of the file.

Opening costs milliseconds and no memory, so a hostile file cannot take a worker with it. HDF5 and zarr would
follow an external link, allocate a chunk of ten terabytes, or (numcodecs before 0.16.6) unpickle an array.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from scarcade.engine.errors import LimitError, OpenError

MAX_CELLS = 10**10
MAX_GENES = 10**7
MAX_VALUES = 2**42  # values of one array
MAX_CHUNK = 1 << 30  # bytes of one chunk, decoded
MAX_METADATA = 64 << 20  # bytes of one JSON file
MAX_MEMBERS = 4_000_000  # files of one zarr folder
MAX_RATIO = 10_000  # decoded bytes to stored bytes, asked of arrays beyond _SMALL
_SMALL = 1 << 30

_V2_CODECS = {"blosc", "zstd", "gzip", "zlib", "lz4", "bz2", "lzma", "shuffle", "delta", "crc32", "crc32c"}
_V2_CODECS |= {"vlen-utf8", "vlen-bytes", "pcodec"}
_V3_CODECS = {"bytes", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed", "transpose", "vlen-utf8", "vlen-bytes"}
_V3_CODECS |= {f"numcodecs.{name}" for name in _V2_CODECS}


def check_array(where: str, shape: tuple[int, ...], chunk: tuple[int, ...] | None, item: int, stored: int) -> None:
    """Refuse an array by its sizes: `item` bytes a value, `stored` bytes on the disk.

    Raises:
        LimitError: more values, larger chunks or a higher compression than any real file has.
    """
    n = _product(shape)
    if n > MAX_VALUES or any(side > MAX_VALUES for side in shape):
        raise LimitError(f"{where}: its shape {shape} means {n:.1e} values; the limit is {MAX_VALUES:.1e}")
    if chunk is not None and _product(chunk) * item > MAX_CHUNK:
        raise LimitError(
            f"{where}: one chunk of shape {chunk} takes {_product(chunk) * item:.1e} bytes; the limit is "
            f"{MAX_CHUNK:.1e}. Rewrite the file with smaller chunks"
        )
    if n * item > _SMALL and n * item > MAX_RATIO * stored:
        raise LimitError(
            f"{where}: claims {n * item:.1e} bytes of values but stores {stored:.1e}; no real data is that empty"
        )


def check_shape(where: str, shape: tuple[int, int]) -> None:
    """Refuse a matrix of cells x genes by its shape.

    Raises:
        LimitError: more cells or genes than any real file has, or fewer than none.
    """
    if not (0 <= shape[0] <= MAX_CELLS and 0 <= shape[1] <= MAX_GENES):
        raise LimitError(f"{where}: shape {shape} is beyond {MAX_CELLS:.0e} cells x {MAX_GENES:.0e} genes")


def check_h5(file: h5py.File) -> None:
    """Refuse an HDF5 file from its metadata.

    Raises:
        LimitError: as `check_array`. OpenError: it points to other files.
    """

    def outer(name: bytes, link: Any) -> bytes | None:  # (h5py does not carry errors out of this callback)
        return name if link.type == h5py.h5l.TYPE_EXTERNAL else None

    def member(name: str, value: Any) -> None:
        if not isinstance(value, h5py.Dataset):
            return
        where = f"{file.filename}: {name}"
        if value.is_virtual or value.external:
            raise OpenError(f"{where}: takes its values from other files; that is not followed")
        if value.shape is not None:
            check_array(where, value.shape, value.chunks, value.dtype.itemsize, value.id.get_storage_size())

    outside = file.id.links.visit(outer, info=True)
    if outside is not None:
        name = outside.decode(errors="replace")
        target = file.get(outside, getlink=True).filename
        raise OpenError(f"{file.filename}: {name} points into another file ({target}); that is not followed")
    file.visititems(member)


def check_zarr(path: Path) -> None:
    """Refuse a zarr folder (version 2 or 3) from its metadata.

    Raises:
        LimitError: as `check_array`, or too many files. OpenError: links that leave the folder, codecs or types
            that are not on the list, metadata that is not JSON.
    """
    sizes: dict[str, int] = {}
    arrays = []
    for folder, meta, stored in _members(path):
        sizes[folder] = stored
        if meta is not None:
            arrays.append((folder, meta))
    for folder, meta in arrays:
        try:
            shape, chunk, item = _v3_array(folder, meta) if "codecs" in meta else _v2_array(folder, meta)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise OpenError(f"{folder}: its zarr metadata is malformed ({error!r})") from error
        stored = _SMALL  # only a large array's bytes on the disk are counted
        if _product(shape) * item > _SMALL:
            below = folder + os.sep
            stored = sum(size for name, size in sizes.items() if name == folder or name.startswith(below))
        check_array(folder, shape, chunk, item, stored)


def _members(path: Path) -> Iterator[tuple[str, dict[str, Any] | None, int]]:
    """(folder, metadata if it is an array, bytes of its own files) of every folder below `path`."""
    inside = os.path.realpath(path)
    n = 0
    for folder, folders, files in os.walk(path, onerror=_unreadable):
        meta, stored = None, 0
        n += len(files) + len(folders)
        if n > MAX_MEMBERS:
            raise LimitError(f"{path}: holds more than {MAX_MEMBERS} files; rewrite it with shards")
        for name in folders + files:
            full = os.path.join(folder, name)
            if os.path.islink(full):
                target = os.path.realpath(full)
                if os.path.commonpath([inside, target]) != inside:
                    raise OpenError(f"{full}: a link that leaves the folder is not followed")
        for name in files:
            full = os.path.join(folder, name)
            try:
                size = os.stat(full).st_size
            except OSError as error:
                raise OpenError(f"{full}: cannot be read ({error.strerror})") from error
            stored += size
            if name in {"zarr.json", ".zarray", ".zgroup", ".zattrs"}:
                raw = _json(Path(full), size)
                if name == ".zarray" or raw.get("node_type") == "array":
                    meta = raw
        yield folder, meta, stored


def _unreadable(error: OSError) -> None:
    raise OpenError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _json(path: Path, size: int) -> dict[str, Any]:
    if size > MAX_METADATA:
        raise LimitError(f"{path}: {size} bytes of metadata; the limit is {MAX_METADATA}")
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise OpenError(f"{path}: is not readable as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise OpenError(f"{path}: is not a JSON object")
    return raw


def _v3_array(where: str, meta: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    _allowed(where, _v3_names(meta["codecs"]), _V3_CODECS)
    if meta.get("storage_transformers"):
        raise OpenError(f"{where}: storage transformers are not supported")
    grid = meta["chunk_grid"]
    if grid["name"] != "regular":
        raise OpenError(f"{where}: chunk grid {grid['name']!r} is not supported")
    chunk = _sides(where, grid["configuration"]["chunk_shape"])
    for codec in meta["codecs"]:
        if isinstance(codec, dict) and codec.get("name") == "sharding_indexed":  # the unit that is decoded at once
            inner = _sides(where, codec["configuration"]["chunk_shape"])
            if len(inner) != len(chunk) or 0 in inner or _product(chunk) // max(_product(inner), 1) > MAX_MEMBERS:
                raise LimitError(f"{where}: shards of {chunk} in chunks of {inner} are beyond any real file")
            chunk = inner
    kind = meta["data_type"]
    name = kind if isinstance(kind, str) else str(kind["name"])
    digits = "".join(filter(str.isdigit, name))
    item = max(1, int(digits) // 8) if digits and len(digits) <= 3 else 16
    if isinstance(kind, dict) and "length_bytes" in (kind.get("configuration") or {}):
        item = int(kind["configuration"]["length_bytes"])
    return _sides(where, meta["shape"]), chunk, item


def _v3_names(codecs: Any) -> Iterator[str]:
    for codec in codecs:
        name = codec if isinstance(codec, str) else str(codec["name"])
        yield name
        if name == "sharding_indexed":
            inner = codec["configuration"]
            yield from _v3_names(inner["codecs"])
            yield from _v3_names(inner.get("index_codecs", ()))


def _v2_array(where: str, meta: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    filters = [str(one["id"]) for one in (meta["filters"] or ())]
    compressor = [str(meta["compressor"]["id"])] if meta["compressor"] else []
    _allowed(where, filters + compressor, _V2_CODECS)
    if not isinstance(meta["dtype"], str):
        raise OpenError(f"{where}: structured values are not supported")
    kind = np.dtype(meta["dtype"])
    if kind.hasobject and not {"vlen-utf8", "vlen-bytes"} & set(filters):
        raise OpenError(f"{where}: holds Python objects; only text is read")
    return _sides(where, meta["shape"]), _sides(where, meta["chunks"]), max(1, kind.itemsize)


def _allowed(where: str, names: Any, allowed: set[str]) -> None:
    if unknown := sorted(set(names) - allowed):
        raise OpenError(f"{where}: codec {', '.join(unknown)} is not on the list of codecs that are read")


def _sides(where: str, raw: Any) -> tuple[int, ...]:
    if not all(isinstance(side, int) and side >= 0 for side in raw):
        raise OpenError(f"{where}: a shape of {raw!r} is not possible")
    return tuple(raw)


def _product(sides: tuple[int, ...]) -> int:
    n = 1
    for side in sides:
        n *= side
    return n
