"""Checkpoints of a run: committed by rename, verified before they are believed, the newest two kept.

A checkpoint is a folder ``step-00001234`` of safetensors, JSON and a manifest. It holds weights, the
optimiser's moments and `TrainingState`; no generator state, since noise and order are functions of
(seed, step, lane). Rank 0 alone writes: the ranks hold the same weights.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scarcade.engine.config import Section
from scarcade.engine.errors import CheckpointError, DataChangedError, InputError, StorageError
from scarcade.engine.folder import committed, problems, sweep, write_json
from scarcade.engine.storage import Mirror
from scarcade.engine.world import World

FORMAT = 1
_PREFIX = "step-"


class CheckpointConfig(Section):
    """When a checkpoint is committed, and how many are kept."""

    every_seconds: float | None = Field(60, gt=0, description="Seconds between two checkpoints.")
    every_steps: int | None = Field(None, ge=1, description="Steps between two checkpoints.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that are kept.")
    max_failures: int = Field(3, ge=1, description="Checkpoints in a row that may fail before the run is given up.")


class Checkpoints:
    """The checkpoints of one run, as `fit` wants them.

    Args:
        folder: where they stand on the local disk.
        about: what is written beside the state: ``data`` (fingerprint), seed, lanes, workers, config.
        mirror: copy each committed checkpoint to ``checkpoints/`` there, and resume from there.
        announce: called on every rank after a save, with the folder (on rank 0) or None: the report to Ray.
        warn: takes a sentence for the user.
        found: is given the state that a run goes on from.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        about: Mapping[str, Any],
        world: World | None = None,
        mirror: Mirror | None = None,
        announce: Callable[[Path | None, int], None] | None = None,
        warn: Callable[[str], None] = print,
        found: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.folder = folder
        self._config = config
        self._about = dict(about)
        self._world = world or World()
        self._mirror = mirror
        self._announce = announce
        self._warn = warn
        self._found = found
        self._saved_at = time.monotonic()
        self._failures = 0

    def due(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is wanted."""
        every, seconds = self._config.every_steps, self._config.every_seconds
        if every is not None and step % every == 0:
            return True
        return seconds is not None and time.monotonic() - self._saved_at >= seconds

    def save(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Commit a checkpoint. A disk that is full is warned of, and borne a few times.

        Raises:
            CheckpointError: `max_failures` in a row could not be written.
        """
        written: Path | None = None
        if self._world.first:
            try:
                written = self._commit(step, state, tensors)
                self._failures = 0
            except StorageError as error:
                self._failures += 1
                limit = self._config.max_failures
                if self._failures >= limit:
                    raise CheckpointError(f"{limit} checkpoints in a row could not be written: {error}") from error
                self._warn(
                    f"warning: the checkpoint at step {step} could not be written ({error}); training goes on from "
                    f"memory, and is given up after {limit - self._failures} more failures in a row"
                )
        self._saved_at = time.monotonic()
        if self._announce is not None:
            self._announce(written, step)

    def _commit(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        target = self.folder / f"{_PREFIX}{step:08d}"
        with committed(target, extra={"format": FORMAT, "kind": "checkpoint", "step": step}, replace=True) as work:
            try:
                save_file(
                    {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, work / "state.safetensors"
                )
            except SafetensorError as error:
                raise StorageError(f"{target}: cannot be written ({error})") from error
            write_json(work / "state.json", {"format": FORMAT, "about": self._about, "state": dict(state)})
        if self._mirror is not None:
            self._mirror.push(target, f"checkpoints/{target.name}")
        self._drop_old()
        return target

    def _drop_old(self) -> None:
        for path in self._there()[: -self._config.keep]:
            # under a temporary name first, so that half a folder is never taken for a checkpoint
            grave = self.folder / f".tmp-dropped-{path.name}"
            try:
                path.replace(grave)
            except OSError as error:
                self._warn(f"warning: the old checkpoint {path} could not be removed ({error.strerror})")
            shutil.rmtree(grave, ignore_errors=True)
        if self._mirror is not None:
            for name in self._mirrored()[: -self._config.keep]:
                self._mirror.remove(f"checkpoints/{name}")

    def _there(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.startswith(_PREFIX) and p.is_dir())

    def _mirrored(self) -> list[str]:
        assert self._mirror is not None
        return [name for name in self._mirror.names("checkpoints") if name.startswith(_PREFIX)]

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The newest checkpoint that is intact; None if there is none at all.

        A damaged one is warned of and the one before it is used.

        Raises:
            CheckpointError: there are some, and none is intact.
            DataChangedError: the data are not those that the run began with.
        """
        self._tidy()
        names = self._mirrored() if self._mirror is not None else [p.name for p in self._there()]
        for name in reversed(names):
            path = self.folder / name
            try:
                if self._mirror is not None and not self._intact(path):
                    shutil.rmtree(path, ignore_errors=True)
                    self._mirror.pull(f"checkpoints/{name}", path)
                raw, tensors = self._read(path)
            except (InputError, OSError, SafetensorError, ValueError, KeyError) as error:
                self._warn(f"warning: {path} is damaged and is passed over ({error})")
                continue
            self._compare(raw["about"])
            if self._found is not None:
                self._found(raw["state"])
            return raw["state"], tensors
        if names:
            raise CheckpointError(
                f"{self.folder}: none of the {len(names)} checkpoints is intact; remove the folder to begin anew"
            )
        return None

    def about(self) -> dict[str, Any] | None:
        """What the newest readable checkpoint says of its run, without reading its tensors."""
        for path in reversed(self._there()):
            try:
                return dict(json.loads((path / "state.json").read_text())["about"])
            except (OSError, ValueError, KeyError):
                continue
        return None

    def _tidy(self) -> None:
        """Remove what a killed commit or removal left."""
        if not self.folder.is_dir():
            return
        for grave in self.folder.glob(".tmp-dropped-*"):
            shutil.rmtree(grave, ignore_errors=True)
        sweep(self.folder)

    @staticmethod
    def _intact(path: Path) -> bool:
        try:
            return not problems(path)
        except InputError:
            return False

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        wrong = problems(path)
        if wrong:
            raise InputError("; ".join(wrong))
        raw = json.loads((path / "state.json").read_text())
        if raw["format"] != FORMAT:
            raise CheckpointError(f"{path}: has format {raw['format']}, and this version reads {FORMAT}")
        return raw, load_file(path / "state.safetensors")

    def _compare(self, about: Mapping[str, Any]) -> None:
        then, now = about.get("data"), self._about.get("data")
        if then != now:
            raise DataChangedError(
                f"{self.folder}: the run began with other data (fingerprint {str(then)[:12]}, now {str(now)[:12]}); "
                "give the data it began with, or another --out to begin a new run"
            )
