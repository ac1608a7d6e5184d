"""A query (or another file) at a URL, as a file of this machine for as long as it is worked on.

It is fetched where it is read: in the driver while queries are validated, in a worker's process when its turn comes.
So the disk holds the queries that are being worked on and no others, and no path of one machine is given to another.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scarcade.engine.download import download, over_http
from scarcade.engine.errors import OpenError, ScarcadeError, StorageError
from scarcade.engine.storage import Mirror, is_url, parted, shown
from scarcade.jobs.queries import Task

_SCRATCH = ".tmp-fetched-"  # swept with what a killed mapping left (`engine.folder.sweep`)


@contextmanager
def fetched(task: Task, out: Path) -> Iterator[Task]:
    """`task` with a file or folder of this machine as its source; a copy below `out` is removed after the block.

    Raises:
        OpenError: there is nothing at the URL. StorageError: the store cannot be reached, or `out` cannot be written.
    """
    if not isinstance(task.source, str) or not is_url(task.source):
        yield task
        return
    url = task.source
    if urlsplit(url).scheme == "file":
        yield replace(task, source=Path(unquote(urlsplit(url).path)), url=shown(url))
        return
    with _copied(url, out, f"--out {out}") as local:
        yield replace(task, source=local, url=shown(url))


@contextmanager
def near(place: str | Path) -> Iterator[Path]:
    """A file or folder of this machine, whose place may be a URL: a copy that is removed after the block.

    Raises:
        OpenError, StorageError: as `fetched`.
    """
    if not is_url(place):
        yield Path(place)
        return
    with _copied(str(place), Path(tempfile.gettempdir()), f"{tempfile.gettempdir()} (TMPDIR)") as local:
        yield local


@contextmanager
def _copied(url: str, parent: Path, option: str) -> Iterator[Path]:
    """A copy below `parent`; messages of the block name the URL instead of it."""
    try:
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
    except OSError as error:
        raise StorageError(f"{option}: cannot be written ({error.strerror})") from error
    try:
        local = scratch / (Path(parted(url)[1]).name or "query")
        fetch(url, local)
        yield local
    except ScarcadeError as error:
        if str(local) not in str(error):
            raise
        # the copy's name tells nobody anything
        raise type(error)(str(error).replace(str(local), shown(url))) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch(url: str, target: Path) -> None:
    """Copy the file or folder at `url` to `target`, which must not be there.

    Raises:
        OpenError, StorageError: as `fetched`.
    """
    if over_http(url):
        download(url, target)
        return
    parent, name = parted(url)
    mirror = Mirror(parent)
    if mirror.pull_file(name, target):
        return
    mirror.pull(name, target)
    if not target.exists():
        raise OpenError(f"{shown(url)}: there is no such file or folder in the store")
