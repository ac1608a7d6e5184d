"""One writer for each target: a lock that the operating system lets go of when its holder dies, however it dies."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from scarcade.engine.errors import BusyError, StorageError


@contextmanager
def sole_writer(target: Path) -> Iterator[None]:
    """Hold ``.NAME.lock`` beside `target`; on entry what a killed writer of `target` left is removed or put back.

    Raises:
        BusyError: another process holds it. StorageError: the folder cannot be written.
    """
    target = Path(target)
    path = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path))
        except OSError:
            ours = False
        if not ours:  # taken, or removed by its holder between our open and our lock
            raise BusyError(f"{target}: another process is writing to it; wait for it or choose another name")
        _clear(target)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _clear(target: Path) -> None:
    """What `engine.folder.committed` and others left under temporary names of `target` when they were killed."""
    ours = re.compile(rf"\.tmp-{re.escape(target.name)}-(old-)?[a-z0-9_]{{8}}")
    for left in sorted(target.parent.glob(f".tmp-{escape(target.name)}-*")):
        match = ours.fullmatch(left.name)
        if match is None or not left.is_dir():
            continue
        moved = left / target.name
        if match.group(1) and moved.exists() and not target.exists():
            os.replace(moved, target)
        shutil.rmtree(left, ignore_errors=True)
