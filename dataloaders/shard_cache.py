"""Shards of remote stores on the local disk: named by their hash, within a budget, shared by a machine's processes.

A file here is whole and is what its name says, because it is written under another name, its hash compared, and then
renamed. A process that wants a file while another fetches it waits for that one. What was not used for longest goes
when room is needed; whoever has it open reads on. The folder may be removed at any time.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scarcade.engine.errors import StorageError, UsageError

_PART = ".part"
_TOUCH_S = 60.0  # a file in use is marked as used at most so often
_SHARE = 0.5  # of what the disk has free, if no budget is given
GB = 10**9


def default_folder() -> Path:
    """``$SCARCADE_CACHE/shards``, or ``scarcade/shards`` in the user's cache."""
    own = os.environ.get("SCARCADE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return (Path(own) if own else Path(base) / "scarcade") / "shards"


def shard_cache(folder: str | Path | None = None, gb: float | None = None) -> "ShardCache | None":
    """The cache in `folder` of at most `gb` gigabytes; None: nothing is to be kept (0).

    Args:
        folder: default: as `default_folder`.
        gb: default: ``$SCARCADE_CACHE_GB``, else half of what the disk has free beside what is cached.

    Raises:
        UsageError: $SCARCADE_CACHE_GB is no number. StorageError: the folder cannot be written.
    """
    if gb is None and (given := os.environ.get("SCARCADE_CACHE_GB")):
        try:
            gb = float(given)
        except ValueError as error:
            raise UsageError(f"SCARCADE_CACHE_GB={given}: a number of gigabytes is wanted") from error
    if gb is not None and gb <= 0:
        return None
    place = Path(folder) if folder is not None else default_folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        if gb is None:
            held = sum(size for _, size, _ in _entries(place))
            return ShardCache(place, int(_SHARE * (shutil.disk_usage(place).free + held)))
    except OSError as error:
        raise _unwritable(place, error) from error
    return ShardCache(place, int(gb * GB))


class ShardCache:
    """Files below `folder`, of `budget` bytes together. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._touched: dict[str, float] = {}

    def holds(self, key: str) -> bool:
        """Whether the file is here."""
        return (self.folder / key).exists()

    def opened(self, key: str) -> int | None:
        """A handle of the file, the caller's to close; None if it is not here."""
        try:
            handle = os.open(self.folder / key, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        now = time.monotonic()
        if now - self._touched.get(key, -_TOUCH_S) >= _TOUCH_S:
            self._touched[key] = now
            os.utime(handle)
        return handle

    def filled(self, key: str, n_bytes: int, fill: Callable[[int], None]) -> int | None:
        """A handle of the file, written by `fill` if nobody else has; None if there is no room for it.

        `fill` is given a handle to write to, and raises if it cannot; then nothing is left.

        Raises:
            StorageError: the folder cannot be written, or the disk is full.
        """
        part = self.folder / f"{key}{_PART}"
        try:
            while (handle := self.opened(key)) is None:
                handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX)  # waits for whoever fetches it now
                    if not _is_at(handle, part):
                        os.close(handle)  # and that one is done with it
                        continue
                    if not self._reserved(handle, part, n_bytes):
                        part.unlink()
                        os.close(handle)
                        return None
                    fill(handle)
                    with self._alone():  # whoever counts what is here would otherwise find it under neither name
                        os.rename(part, self.folder / key)
                except BaseException:
                    part.unlink(missing_ok=True)
                    os.close(handle)
                    raise
                return handle
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return handle

    def _reserved(self, handle: int, part: Path, n_bytes: int) -> bool:
        """Take room for `n_bytes`, away from files that were not used for longest."""
        with self._alone():
            os.ftruncate(handle, 0)
            found = sorted(_entries(self.folder))
            total = sum(size for _, size, _ in found) + n_bytes
            for _, size, path in found:
                if total <= self.budget:
                    break
                if path == part or (path.suffix == _PART and not _left_by_the_dead(path)):
                    continue
                path.unlink(missing_ok=True)
                total -= size
            if total > self.budget:
                return False
            if n_bytes:
                os.posix_fallocate(handle, 0, n_bytes)
            return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """(when it was last used, bytes, path) of each file."""
    found = []
    for entry in os.scandir(folder):
        try:
            if not entry.name.startswith(".") and entry.is_file():
                about = entry.stat()
                found.append((about.st_mtime, about.st_size, Path(entry.path)))
        except FileNotFoundError:  # renamed or removed meanwhile
            continue
    return found


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _left_by_the_dead(part: Path) -> bool:
    """Whether nobody holds the lock of a file that is not whole."""
    try:
        handle = os.open(part, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _unwritable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{folder}: the cache of remote shards cannot be used ({error.strerror or error}); --data.cache or "
        "SCARCADE_CACHE names another folder, --data.cache-gb or SCARCADE_CACHE_GB how much it may hold (0: nothing)"
    )
