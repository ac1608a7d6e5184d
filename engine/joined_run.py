"""Remembers which run of a tracking server a run of ours is, in ``OUT/mlflow.json``, so that it is joined again."""

import json
from pathlib import Path
from typing import Any

from scarcade.engine.errors import OpenError
from scarcade.engine.folder import write_json


class JoinedRun:
    """What is kept of the run at one target.

    Attributes:
        ident: how the run is called there; None: there is none yet.
        step: lines up to this step were sent, where that is kept at all.
    """

    def __init__(self, folder: Path, target: str) -> None:
        self._path = folder / f"{target}.json"
        raw: dict[str, Any] = {}
        try:
            raw = json.loads(self._path.read_text())
            self.ident: str | None = None if raw["run"] is None else str(raw["run"])
            self.step = int(raw["step"])
        except FileNotFoundError:
            self.ident, self.step = None, -1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OpenError(f"{self._path}: cannot be read ({error}); without it a new run is begun there") from error

    def keep(self, ident: str, step: int = -1) -> None:
        """From now on it is this run, which has the lines up to `step`."""
        if (ident, step) != (self.ident, self.step):
            self.ident, self.step = ident, step
            write_json(self._path, {"run": ident, "step": step})
