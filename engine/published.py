"""Folders whose place may be a URL: written on this disk, and copied there when they are whole, the manifest last."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scarcade.engine.errors import StorageError, UsageError
from scarcade.engine.storage import Mirror, is_url, parted, shown


def is_there(out: str | Path) -> bool:
    """Whether something lies at `out`, a path or a URL.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    if not is_url(out):
        return Path(out).exists()
    mirror, name = _place(str(out))
    return mirror.exists(name) or bool(mirror.entries(name))


@contextmanager
def published(out: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A path to write a folder to within the block: `out` itself, or one of this disk that is copied to the URL.

    An object store has no rename: while a folder is replaced there is for a while none, and never half of one, because
    its manifest goes first and comes last. A block that writes nothing changes nothing.

    Raises:
        StorageError: something is there and is not to be replaced; the store does not answer; no room on this disk.
            What was computed is kept if it cannot be copied, and the message says where.
    """
    if not is_url(out):
        yield Path(out)
        return
    url = str(out)
    mirror, name = _place(url)
    if not replace and is_there(url):
        raise StorageError(f"{shown(url)}: exists already")
    try:
        scratch = Path(tempfile.mkdtemp(prefix="scarcade-out-"))
    except OSError as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: what goes to {shown(url)} is written here first, and cannot be "
            f"({error.strerror}); TMPDIR names another folder"
        ) from error
    local = scratch / name
    keep = False
    try:
        yield local
        if local.exists():
            keep = True
            mirror.remove(name)
            mirror.push(local, name)
            keep = False
    except StorageError as error:
        if not keep:
            raise
        raise StorageError(f"{error}; all that was computed is kept in {local}") from error
    finally:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)


def _place(url: str) -> tuple[Mirror, str]:
    folder, name = parted(url)
    if not name:
        raise UsageError(f"{shown(url)}: is a whole bucket; name a folder in it")
    return Mirror(folder), name
