"""Files of a store, wherever it lies: bytes by name and place, small files checked whole.

Files are read, not mapped: a mapped file counts as memory of the process, and a cut one kills it (SIGBUS).
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from scarcade.engine.errors import CorruptError, MissingChunkError, OpenError, StorageError


class Files(Protocol):
    """The one seam to storage: bytes of named files below a store."""

    where: str

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `name` from `offset` on, all of them or an error."""
        ...

    def size(self, name: str) -> int:
        """Bytes of `name`."""
        ...

    def handle(self, name: str) -> int | None:
        """`name`, opened to be read; None if it is not on a disk of this machine. The caller closes it."""
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

    def handle(self, name: str) -> int:
        return self._open(name)

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
            read_all(handle, offset, out, f"{self.where}: {name}")
        except OSError as error:
            raise StorageError(f"{self.where}: {name} cannot be read ({error.strerror})") from error
        finally:
            os.close(handle)


def read_all(handle: int, offset: int, out: memoryview, where: str) -> None:
    """Fill `out` with the bytes of an open file from `offset` on.

    Raises:
        CorruptError: the file ends before. OSError: it cannot be read.
    """
    done = 0
    while done < len(out):
        got = os.preadv(handle, [out[done:]], offset + done)
        if got == 0:
            raise CorruptError(f"{where} was cut: it ends at byte {offset + done}")
        done += got


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
