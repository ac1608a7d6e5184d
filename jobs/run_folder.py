"""The folder of a run, ``runs/NAME``, on this disk or at a URL: its configuration, its lock, what is finished.

::

    config.toml           as resolved; the same command again is held to it
    metrics.jsonl         one JSON object a line; with --log drawn from it: tensorboard/, mlflow.db, wandb/
    checkpoints/step-*    the newest two
    model/                the trained model, once the run is over
"""

import fcntl
import json
import os
import shutil
import socket
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from scarcade.engine.errors import BusyError, InputError, OpenError, StorageError, UsageError
from scarcade.engine.folder import problems, sweep, write_bytes
from scarcade.engine.metrics import MetricsFile
from scarcade.engine.storage import Mirror, is_url

CONFIG, METRICS, CHECKPOINTS, MODEL = "config.toml", "metrics.jsonl", "checkpoints", "model"
_JOINED = ("mlflow.json", "wandb.json")  # which runs there this one is
CURVES = "tensorboard"

# What may differ between two starts of one run: where and how fast it is computed, not what.
_FREE = (
    "scale.",
    "checkpoint.",
    "log.",
    "optim.log_every",
    "optim.record",
    "data.read_ahead",
    "data.gpu_memory",
    "data.path",
    "data.cache",
)
_MAY_GROW = ("optim.epochs", "optim.max_steps")


class RunFolder:
    """One run's folder. Of a URL, `local` is a scratch folder and `mirror` the place itself."""

    def __init__(self, place: str | Path) -> None:
        self.mirror: Mirror | None = None
        if is_url(place):
            self.place = str(place).rstrip("/")
            self.mirror = Mirror(self.place)
            self.local = Path(tempfile.mkdtemp(prefix="scarcade-run-"))
        else:
            self.local = Path(place).absolute()
            self.place = str(self.local)
        self.metrics = MetricsFile(self.local / METRICS)
        self.checkpoints = self.local / CHECKPOINTS
        self.model = self.local / MODEL

    def close(self) -> None:
        """Remove the scratch folder of a run at a URL."""
        if self.mirror is not None:
            shutil.rmtree(self.local, ignore_errors=True)

    def fetch(self) -> None:
        """Bring configuration and metrics here from the URL."""
        if self.mirror is not None:
            for name in (CONFIG, METRICS, *_JOINED):
                self.mirror.pull_file(name, self.local / name)

    def publish_metrics(self) -> None:
        """Bring the metrics to the URL, and the curves drawn from them."""
        if self.mirror is not None and self.metrics.path.exists():
            self.mirror.push_file(self.metrics.path, METRICS)
            for path in [*(self.local / name for name in _JOINED), *(self.local / CURVES).glob("*")]:
                if path.is_file():
                    self.mirror.push_file(path, path.relative_to(self.local).as_posix())

    def publish_model(self) -> None:
        """Bring the model to the URL, in place of an older one."""
        if self.mirror is not None:
            self.mirror.remove(MODEL)
            self.mirror.push(self.model, MODEL)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else works on this run within the block.

        (At a URL, nobody else of this machine: object stores have no locks.)

        Raises:
            BusyError: somebody does; says which process on which machine.
        """
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            if self.mirror is None:
                path = self.local / "lock"
            else:
                path = (
                    Path(tempfile.gettempdir())
                    / f"scarcade-{os.getuid()}-{sha256(self.place.encode()).hexdigest()[:16]}.lock"
                )
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"--out {self.place}: cannot be written ({error.strerror})") from error
        with os.fdopen(handle, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                who = file.read().strip() or "another process"
                raise BusyError(
                    f"--out {self.place}: {who} is working on this run; wait, or give another --out"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
            file.seek(0)
            file.truncate(0)

    def sweep(self) -> None:
        """Remove what a killed run left half-written. Only call it within `locked`."""
        sweep(self.local)

    def settle(
        self,
        config: str,
        defaults: Mapping[str, Any] | None = None,
        *,
        free: tuple[str, ...] = _FREE,
        may_grow: tuple[str, ...] = _MAY_GROW,
    ) -> None:
        """Write ``config.toml``, or hold a run that is there already, and has kept something, to its own.

        Args:
            defaults: of settings that the run's file may lack, because an older version began it without them.
            free: beginnings of the names of settings that may change. may_grow: names of those that may be raised.

        Raises:
            UsageError: a setting differs that a run cannot change, or the folder is something else.
        """
        path = self.local / CONFIG
        if not path.exists():
            others = [p.name for p in self.local.iterdir() if p.name != "lock"]
            if others:
                raise UsageError(f"--out {self.place}: is not empty and not a run (it holds {sorted(others)[0]})")
            write_bytes(path, config.encode())
        else:
            try:
                before = tomllib.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise OpenError(f"{path}: cannot be read ({error}); restore it or give another --out") from error
            if self._holds_work():
                _same({**flat(defaults or {}), **flat(before)}, flat(tomllib.loads(config)), self.place, free, may_grow)
            write_bytes(path, config.encode())
        if self.mirror is not None:
            self.mirror.push_file(path, CONFIG)

    def _holds_work(self) -> bool:
        """Whether anything is there that was made with its settings: what ended before is begun anew."""
        begun = {CONFIG, METRICS, "lock"}
        if self.mirror is not None and {name for name, _ in self.mirror.entries()} - begun:
            return True
        others = [path for path in self.local.iterdir() if path.name not in begun]
        return any(not path.is_dir() or any(path.iterdir()) for path in others)

    def lanes(self) -> int | None:
        """The lanes that the run began with, which it keeps on any number of workers; None for a new run."""
        try:
            return int(tomllib.loads((self.local / CONFIG).read_text())["data"]["lanes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def model_record(self) -> dict[str, Any] | None:
        """What ``model.json`` says, if a complete model is there (manifest and sizes are looked at)."""
        path = self.model / "model.json"
        try:
            if self.mirror is None:
                if problems(self.model, deep=False):
                    return None
            elif not self.mirror.exists(f"{MODEL}/MANIFEST.json") or not self.mirror.pull_file(
                f"{MODEL}/{path.name}", path
            ):
                return None
            return dict(json.loads(path.read_text()))
        except (InputError, OSError, ValueError):
            return None


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1e-3}}`` -> ``{"optim.lr": 1e-3}``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _same(
    old: Mapping[str, Any], new: Mapping[str, Any], place: str, free: tuple[str, ...], may_grow: tuple[str, ...]
) -> None:
    """Refuse a configuration that the run at `place` did not begin with.

    Raises:
        UsageError: naming each field, what it was and what it is.
    """
    changed = []
    for name in sorted({*old, *new}):
        was, given = old.get(name), new.get(name)
        if was == given or name.startswith(free):
            continue
        if name in may_grow and (given is None or (was is not None and given > was)):
            continue
        changed.append(f"--{name} was {was}, now {given}")
    if changed:
        raise UsageError(
            f"--out {place}: this run began with other settings ({'; '.join(changed)}); give those it began with "
            f"({' and '.join(name.rpartition('.')[2].removeprefix('max_') for name in may_grow)} may be raised), or "
            "another --out"
        )
