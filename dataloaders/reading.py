"""Reading from files that somebody else wrote, whose bytes may be missing or broken."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from scarcade.engine.errors import LimitError, MissingChunkError, OpenError, ScarcadeError
from scarcade.engine.quiet import quiet

T = TypeVar("T")


def check_present(array: Any, where: str) -> None:
    """Whether every chunk of a zarr array is on the disk and not empty: zarr reads those that are not as zeros.

    Raises:
        MissingChunkError: how many are not.
    """
    folder = Path(str(array.store.root)) / array.path if hasattr(array.store, "root") else None
    if 0 in array.shape or folder is None:
        return
    held = sum(
        1
        for parent, _, files in os.walk(folder)
        for name in files
        if name not in {"zarr.json", ".zarray", ".zattrs"} and os.path.getsize(os.path.join(parent, name)) > 0
    )
    unit = array.shards or array.chunks
    wanted = int(np.prod([-(-side // part) for side, part in zip(array.shape, unit, strict=True)]))
    if held < wanted:
        raise MissingChunkError(f"{where}: {wanted - held} of {wanted} chunks are missing or empty")


def attempt(where: str, read: Callable[[], T]) -> T:
    """The result of `read`; what h5py, zarr, anndata and their codecs raise on broken bytes becomes an OpenError."""
    try:
        with quiet():  # anndata's and zarr's advice is for those who wrote the file
            return read()
    except ScarcadeError:
        raise
    except MemoryError as error:
        raise LimitError(f"{where}: is too large to be read ({error})") from error
    except Exception as error:  # broken bytes raise anything, from KeyError to zlib's own
        if "filter returned failure" in str(error):  # HDF5 could not unpack a chunk
            raise OpenError(
                f"{where}: its bytes are damaged ({str(error)[:200]}); copy or download the file again"
            ) from error
        raise OpenError(f"{where}: cannot be read ({type(error).__name__}: {str(error)[:200]})") from error


def piece(array: Any, start: int, stop: int, where: str) -> np.ndarray:
    """``array[start:stop]`` in memory.

    Raises:
        OpenError: its bytes cannot be decoded.
    """
    if stop <= start:
        return np.empty((0, *array.shape[1:]), array.dtype)
    return attempt(where, lambda: np.asarray(array[int(start) : int(stop)]))
