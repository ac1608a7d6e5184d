"""Finds out before the training whether every worker sees the run's folder, or only the machine that began it.

A folder on one machine's own disk looks the same on all of them, and is empty on the others: the worker that commits
would do so where nobody looks for it, and the run could not go on after its node is lost.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scarcade.engine.errors import StorageError
from scarcade.engine.storage import is_url

_PREFIX = ".tmp-launch-"  # so that a sweep of the folder removes one whose launch was killed
_PATIENCE_S = 10.0  # shared disks may take as long to show a new file


@contextmanager
def marked(place: str, launch: str) -> Iterator[None]:
    """Within the block a file in the folder `place` tells of `launch`; nothing at a URL, which all machines see.

    Raises:
        StorageError: the folder cannot be written.
    """
    if is_url(place):
        yield
        return
    marker = Path(place, _PREFIX + launch)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise StorageError(f"--out {place}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def sees(place: str, launch: str, *, patience_s: float = _PATIENCE_S) -> bool:
    """Whether this process finds in `place` what `marked` put there, in `patience_s` at the latest."""
    if is_url(place):
        return True
    deadline = time.monotonic() + patience_s
    while not Path(place, _PREFIX + launch).exists():
        if time.monotonic() > deadline:
            return False
        if Path(place).is_dir():
            os.listdir(place)  # on a shared disk that makes the machine ask again
        time.sleep(0.2)
    return True


def unseen(place: str, node: str) -> StorageError:
    """The error of a run whose folder the worker on `node` does not see."""
    return StorageError(
        f"--out {place}: the node {node} does not see this folder; a run on several nodes needs one that all of them "
        "share (NFS, Lustre, ...), or a URL such as s3://bucket/runs/NAME"
    )
