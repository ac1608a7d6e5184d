"""A model at a URL, as a folder of this machine: fetched once, kept under the hash of its manifest, checked by it.

A model that is trained anew has another manifest, so what is kept never grows old. The folder is
``$SCARCADE_CACHE``, or ``scarcade`` in the user's cache; it may be removed at any time.
"""

import os
import shutil
import tempfile
from pathlib import Path

from scarcade.engine.errors import StorageError
from scarcade.engine.folder import MANIFEST, problems, sha256
from scarcade.engine.storage import is_url
from scarcade.jobs.elsewhere import Elsewhere


def local_model(place: str | Path) -> Path:
    """The folder of the model at `place`, a path or a URL.

    Raises:
        OpenError: nothing of ours is at the URL. CorruptError: what came is not what its manifest says.
        StorageError: the store or the cache does not work.
    """
    if not is_url(place):
        return Path(place)
    url = str(place).rstrip("/")
    cache = _cache()
    work: Path | None = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=cache))
        there = Elsewhere(url)
        manifest = there.manifest(work / MANIFEST)
        kept = cache / sha256(work / MANIFEST)[:32]
        if kept.is_dir() and not problems(kept, deep=False):  # (every byte is checked when the model is read)
            return kept
        there.fetch(manifest, work / "model")
        os.replace(work / MANIFEST, work / "model" / MANIFEST)
        shutil.rmtree(kept, ignore_errors=True)
        try:
            os.replace(work / "model", kept)
        except OSError:
            if not kept.is_dir():  # else another process was faster, with the same bytes
                raise
        return kept
    except OSError as error:
        hint = "SCARCADE_CACHE names another folder"
        raise StorageError(f"{cache}: cannot be written ({error.strerror or error}); {hint}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _cache() -> Path:
    own = os.environ.get("SCARCADE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return (Path(own) if own else Path(base) / "scarcade") / "models"
