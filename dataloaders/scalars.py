"""Numbers and strings of a store that are one value each, read without anndata.

Anndata reads them just as well, and brings dask and zarr with it: a third of a second that a training which asks for
nothing else of anndata would wait for its first step, in every worker. Each is one chunk, compressed by zstd, as
anndata writes it.
"""

import json
from collections.abc import Mapping
from typing import Any

import numcodecs.vlen
import numpy as np
from numcodecs import zstd

from scarcade.dataloaders.stored_files import Files, read_checked
from scarcade.engine.errors import CorruptError

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


def read_scalar(files: Files, name: str, manifest: Mapping[str, Any]) -> str | int | float | None:
    """The value; None where it is written in another way than the one known here.

    Raises:
        MissingChunkError, CorruptError: it is not what was written.
    """
    where = f"{files.where}: {name}"
    try:
        meta = json.loads(read_checked(files, f"{name}/zarr.json", manifest))
        first, *others = meta["codecs"]
        kind, known = meta["data_type"], [codec["name"] for codec in others] == ["zstd"]
        if meta["shape"] != [] or meta["chunk_key_encoding"]["name"] != "default" or not known:
            return None
        if f"{name}/c" not in manifest["files"]:  # a value that is the one to fill with is not written
            found = meta["fill_value"]
            return found if isinstance(found, str | int | float) else None
        content = zstd.decompress(read_checked(files, f"{name}/c", manifest))
        if kind == "string" and first["name"] == "vlen-utf8":
            (text,) = numcodecs.vlen.VLenUTF8().decode(content)
            return str(text)
        if np.dtype(kind).kind in "iuf" and first in (_BYTES, {"name": "bytes"}):
            (value,) = np.frombuffer(content, np.dtype(kind).newbyteorder("<")).tolist()
            return int(value) if np.dtype(kind).kind in "iu" else float(value)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptError(f"{where} is not of our making ({error!r})") from error
    return None
