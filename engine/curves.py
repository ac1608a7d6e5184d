"""Sends the metrics of a run on to TensorBoard, MLflow or Weights & Biases, beside the training.

``metrics.jsonl`` is what is believed; each of these follows that file in a thread of its own. So none of them can stop
a training or make it wait: one whose server is gone or whose disk is full is warned of once and let go. And a run that
is continued, also one that is over already, first sends what is missing, so curves have no gaps and nothing twice.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from scarcade.engine.config import Section
from scarcade.engine.errors import UsageError
from scarcade.engine.metrics import Line, MetricsFile

Target = Literal["tensorboard", "mlflow", "wandb"]
TITLES: Mapping[str, str] = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "wandb": "Weights & Biases"}
_NEEDS: Mapping[str, Sequence[str]] = {
    "tensorboard": ("tensorboardX",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "wandb": ("wandb",),
}
_CLOSING_S = 30.0  # how long the end of a run waits for its last lines to be taken
_PLACE = ("step", "epoch", "time", "of")  # fields of a line that say where it stands


class LogConfig(Section):
    """Where the metrics of a training go, besides ``metrics.jsonl``."""

    to: tuple[Target, ...] = Field((), description="Any of tensorboard, mlflow, wandb.")
    project: str = Field("scarcade", min_length=1, description="MLflow's experiment, the project of Weights & Biases.")
    name: str | None = Field(None, description="Name of the run there; default: that of its folder.")
    mlflow: str | None = Field(
        None, description="MLflow's tracking URI; default: MLFLOW_TRACKING_URI, else the file OUT/mlflow.db."
    )
    wandb: Literal["offline", "online"] = Field(
        "offline", description="offline: files for `wandb sync` in OUT/wandb; online: sent to the server at once."
    )

    @property
    def mlflow_place(self) -> str | None:
        """The tracking URI that was given, here or to MLflow itself."""
        return self.mlflow or os.environ.get("MLFLOW_TRACKING_URI") or None


@dataclass(frozen=True)
class About:
    """What a target is told of the run beside its lines."""

    name: str
    folder: Path
    settings: Mapping[str, Any]  # dotted name -> value


class Sink(Protocol):
    """One target of one run, already joined. Whatever its methods raise ends it, and nothing else."""

    after: int
    """Lines up to this step were taken in earlier starts; -1: none."""

    def write(self, line: Line) -> None:
        """Take the numbers of one line."""
        ...

    def flush(self) -> None:
        """What was written shall be seen now."""
        ...

    def close(self, ended: str) -> None:
        """The run is over for now: "finished", "interrupted" or "failed"."""
        ...


def check_installed(config: LogConfig) -> None:
    """Refuse a target whose library is not there.

    Raises:
        UsageError: with what to install.
    """
    for target in config.to:
        missing = [name for name in _NEEDS[target] if importlib.util.find_spec(name) is None]
        if missing:
            how = "ray[tune]" if target == "tensorboard" else f"scarcade[{target}]"
            raise UsageError(
                f"--log {target}: {TITLES[target]} is not installed ({', '.join(missing)} not found); "
                f'pip install "{how}", or leave it out of --log'
            )


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What a line measures. Losses of part of an epoch are another curve than those of whole epochs."""
    within = "" if line.get("of") == "epoch" else "within_epoch/"
    return {
        (within + name if "/" in name else name): float(value)
        for name, value in line.items()
        if name not in _PLACE and isinstance(value, int | float)
    }


@dataclass
class Curves:
    """Follows the metrics of one run into one sink.

    Args:
        title: how the target is called in a warning.
        opened: joins the target; called in the thread, since it may wait for a network.
        patience_s: how long `close` waits.
    """

    title: str
    metrics: MetricsFile
    opened: Callable[[], Sink]
    warn: Callable[[str], None]
    patience_s: float = _CLOSING_S
    _wake: threading.Event = field(default_factory=threading.Event)
    _ended: str = ""
    _error: str = ""
    _warned: bool = False
    _thread: threading.Thread | None = None

    def moved(self) -> None:
        """A line was written. (Not before: a run that continues drops lines beyond its checkpoint when it begins.)"""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"curves of {self.title}", daemon=True)
            self._thread.start()
        self._wake.set()
        self._tell()

    def close(self, ended: str) -> None:
        """Send what is left, and wait for it, but not for ever."""
        self._ended = ended
        self.moved()
        assert self._thread is not None
        self._thread.join(self.patience_s)
        if self._thread.is_alive():
            self._error = f"it did not take the last lines within {self.patience_s:.0f} s"
        self._tell()

    def _tell(self) -> None:
        """Warn of what the thread met, from the thread that trains, whose messages come in order."""
        if self._error and not self._warned:
            self._warned = True
            self.warn(
                f"{self.title} gets no more metrics of this run ({self._error}); the training goes on, all of them are "
                f"in {self.metrics.path.name}, and the same command sends what is missing"
            )

    def _run(self) -> None:
        try:
            sink, offset, over = self.opened(), 0, False
            while not over:
                self._wake.wait()
                self._wake.clear()
                over = bool(self._ended)
                lines, offset = self.metrics.follow(offset)
                for line in lines:
                    if line.get("step", 0) > sink.after:
                        sink.write(line)
                sink.flush()
            sink.close(self._ended)
        except Exception as error:  # noqa: BLE001  (of any library; it is told, and the training does without)
            self._error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
