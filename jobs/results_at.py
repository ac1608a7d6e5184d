"""Results of a mapping at a URL: a folder of this machine that is brought there, and that begins with what is there.

The folder is kept under the URL's hash, in ``$SCARCADE_CACHE`` or the user's cache, until all of it has been copied: a
mapping that is killed is continued on this machine by the same command, and on another one from what was copied. The
summary goes up last, so who finds it finds the results that it tells of.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from scarcade.engine.errors import StorageError, UsageError
from scarcade.engine.lock import sole_writer
from scarcade.engine.storage import Mirror, is_url, parted, shown
from scarcade.jobs.results import SUMMARY

_AT_ONCE = 8
Stamp = tuple[int, int]


@contextmanager
def results_at(out: str | Path) -> Iterator[Path]:
    """The folder to write to within the block; after it, also after an error, what changed is at the URL.

    Raises:
        UsageError: the URL is a whole bucket. BusyError: another command of this machine writes there.
        StorageError: the store does not answer, or refuses; the folder cannot be written.
    """
    if not is_url(out):
        yield Path(out)
        return
    url = str(out).rstrip("/")
    parent, name = parted(url)
    if not name:
        raise UsageError(f"--out {shown(url)}: is a whole bucket; name a folder in it")
    local = _folder(url)
    with sole_writer(local):
        if not local.exists():
            pulled = local.with_name(f".tmp-{local.name}-pulled00")  # `sole_writer` removes it if we are killed
            Mirror(parent).pull(name, pulled)
            pulled.mkdir(exist_ok=True)
            os.replace(pulled, local)
            before = _stamps(local)
        else:  # left by a mapping that was stopped: only what has the same size is taken for the same
            there = Mirror(url).sizes()
            before = {file: stamp for file, stamp in _stamps(local).items() if there.get(file) == stamp[0]}
            before.pop(SUMMARY, None)
        try:
            yield local
        finally:
            _push(local, Mirror(url), before)
        shutil.rmtree(local, ignore_errors=True)


def _push(local: Path, mirror: Mirror, before: dict[str, Stamp]) -> None:
    after = _stamps(local)
    for gone in sorted(before.keys() - after.keys()):
        mirror.remove_file(gone)
    changed = sorted(file for file, stamp in after.items() if before.get(file) != stamp)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(lambda file: mirror.push_file(local / file, file), [f for f in changed if f != SUMMARY]):
            pass
    if SUMMARY in changed:
        mirror.push_file(local / SUMMARY, SUMMARY)


def _stamps(folder: Path) -> dict[str, Stamp]:
    """Size and time of each file that is a result: nothing half-written, and no lock."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and ".tmp-" not in name and not name.endswith(".lock"):
            about = path.stat()
            found[name] = about.st_size, about.st_mtime_ns
    return found


def _folder(url: str) -> Path:
    own = os.environ.get("SCARCADE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    place = (Path(own) if own else Path(base) / "scarcade") / "results"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{place}: results for {shown(url)} are written here first, and cannot be ({error.strerror}); "
            "SCARCADE_CACHE names another folder"
        ) from error
    return place / hashlib.sha256(url.encode()).hexdigest()[:32]
