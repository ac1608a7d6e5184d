"""A folder for what of one query does not fit into memory: made when it is needed, removed whatever happens."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from scarcade.engine.errors import StorageError

_NAME = ".tmp-scratch-"  # `engine.folder.sweep` removes what begins so


@dataclass(frozen=True)
class Scratch:
    """A folder beside the results of a query for what does not fit into memory: made when it is needed.

    Its name is a function of the query's, so that what a killed process left is found by the next attempt.
    """

    parent: Path
    name: str  # of the query

    @property
    def path(self) -> Path:
        return self.parent / f"{_NAME}{hashlib.sha256(self.name.encode()).hexdigest()[:16]}"

    def made(self) -> Path:
        """The folder, empty.

        Raises:
            StorageError: it cannot be made.
        """
        self.remove()
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from error
        return self.path

    def remove(self) -> None:
        """Nothing is left of it."""
        shutil.rmtree(self.path, ignore_errors=True)
