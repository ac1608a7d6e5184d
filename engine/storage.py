"""A run folder at a URL: folders are written on the local disk and copied there, the manifest last.

An object store has no rename, so the commit of a folder is its MANIFEST.json: a folder without one, or with
files that differ from it, was never finished. Any URL that Ray and pyarrow take is fine (``s3://bucket/runs``,
``gs://``, ``file://``).
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from scarcade.engine.errors import OpenError, StorageError
from scarcade.engine.folder import MANIFEST

T = TypeVar("T")
_TRIES = 4


def is_url(place: str | Path) -> bool:
    """Whether `place` names something other than a path of this machine."""
    return "://" in str(place)


class Mirror:
    """Files and folders below one URL.

    Raises (every method):
        StorageError: the store did not answer after several tries.
    """

    def __init__(self, url: str) -> None:
        from pyarrow import fs

        self.url = url.rstrip("/")
        try:
            self.filesystem, self.root = fs.FileSystem.from_uri(self.url)
        except (OSError, ValueError) as error:
            raise OpenError(f"{url}: not a URL of a store that can be reached ({error})") from error
        self._info = fs.FileSelector, fs.FileType

    def push(self, folder: Path, name: str) -> None:
        """Copy the committed `folder` to ``<url>/<name>``; its manifest comes last."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        for path in sorted(files, key=lambda p: p.name == MANIFEST and p.parent == folder):
            self.push_file(path, f"{name}/{path.relative_to(folder).as_posix()}")

    def push_file(self, path: Path, name: str) -> None:
        """Copy one file to ``<url>/<name>``."""

        def copy() -> None:
            target = f"{self.root}/{name}"
            self.filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
            with open(path, "rb") as source, self.filesystem.open_output_stream(target) as out:
                shutil.copyfileobj(source, out, 8 << 20)

        self._tried(copy, name)

    def pull(self, name: str, target: Path) -> None:
        """Copy the folder ``<url>/<name>`` to `target`, which must not be there."""
        for inner in self._tried(lambda: self._files(name), name):
            self.pull_file(f"{name}/{inner}", target / inner)

    def pull_file(self, name: str, target: Path) -> bool:
        """Copy one file to `target`; False if the store has none of that name."""

        def copy() -> bool:
            found = self.filesystem.get_file_info(f"{self.root}/{name}")
            if not found.is_file:
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 8 << 20)
            return True

        return self._tried(copy, name)

    def names(self, below: str) -> list[str]:
        """Names of the folders directly below ``<url>/<below>``, sorted."""

        def found() -> list[str]:
            selector, kinds = self._info
            infos = self.filesystem.get_file_info(selector(f"{self.root}/{below}", allow_not_found=True))
            return sorted(info.base_name for info in infos if info.type == kinds.Directory)

        return self._tried(found, below)

    def exists(self, name: str) -> bool:
        """Whether ``<url>/<name>`` is a file."""
        return self._tried(lambda: bool(self.filesystem.get_file_info(f"{self.root}/{name}").is_file), name)

    def remove(self, name: str) -> None:
        """Remove a folder, its manifest first, so that half of it is never taken for the whole."""

        def gone() -> None:
            for inner in sorted(self._files(name), key=lambda inner: inner != MANIFEST):
                self.filesystem.delete_file(f"{self.root}/{name}/{inner}")
            found = self.filesystem.get_file_info(f"{self.root}/{name}")
            if found.type == self._info[1].Directory:
                self.filesystem.delete_dir(f"{self.root}/{name}")

        self._tried(gone, name)

    def remove_file(self, name: str) -> None:
        """Remove one file, if it is there."""

        def gone() -> None:
            if self.filesystem.get_file_info(f"{self.root}/{name}").is_file:
                self.filesystem.delete_file(f"{self.root}/{name}")

        self._tried(gone, name)

    def _files(self, name: str) -> list[str]:
        selector, _ = self._info
        base = f"{self.root}/{name}/"
        infos = self.filesystem.get_file_info(selector(base.rstrip("/"), allow_not_found=True, recursive=True))
        return [info.path.removeprefix(base) for info in infos if info.is_file]

    def _tried(self, action: Callable[[], T], name: str) -> T:
        """`action`, again after a pause if the store fails."""
        problem: Any = None
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(0.5 * 2**attempt)
            try:
                return action()
            except OSError as error:
                problem = error
        raise StorageError(f"{self.url}/{name}: the store did not answer after {_TRIES} tries ({problem})")
