"""The trials of a search and what is known of each: held here, and kept in ``OUT/trials/NAME/trial.json``.

A record is written by one rename whenever a trial has news, by the driver alone. Nothing else is needed to continue a
search: what Ray keeps of it is thrown away.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from scarcade.engine.errors import CorruptError, StorageError
from scarcade.engine.folder import sweep, write_json
from scarcade.jobs.tune_trial import State, Trial

TRIALS = "trials"
RECORD = "trial.json"
DEFAULTS = "defaults"  # name of the one that is not searched, but compared with
_OVER: tuple[State, ...] = ("done", "stopped", "failed")
_READER = TypeAdapter(Trial)


def is_over(trial: Trial) -> bool:
    """Whether nothing is left to do for it."""
    return trial.state in _OVER


def trial_folder(out: Path, name: str) -> Path:
    """Where the trial `name` of the search in `out` keeps its record, metrics and checkpoints."""
    return out / TRIALS / name


def read_record(out: Path, name: str) -> Trial:
    """The record of one trial.

    Raises:
        CorruptError: it is not what we write. OSError: it cannot be read.
    """
    path = trial_folder(out, name) / RECORD
    try:
        trial = _READER.validate_python(json.loads(path.read_text()))
        if trial.name != name:
            raise ValueError(f"it is that of {trial.name}")
        return trial
    except (ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise CorruptError(f"{path}: is not a trial's record ({first}); remove {path.parent} to run it anew") from error


def as_config(trial: Trial) -> str:
    """A trial in Ray's configuration: as text, since Ray puts placeholders in the place of anything else."""
    return json.dumps({"name": trial.name, "parameters": trial.parameters})


class Board:
    """All trials of a search, by name. Its methods may be called from several threads.

    Args:
        out: folder of the search. mode: whether less or more of the objective is better.
    """

    def __init__(self, out: Path, mode: Literal["min", "max"]) -> None:
        self.out, self.mode = out, mode
        self._trials: dict[str, Trial] = {}
        self._lock = threading.Lock()
        self.news = 0  # changes so far

    def load(self) -> None:
        """Take up the records of an earlier start; what was running then is waiting now.

        Raises:
            CorruptError: a record is not what we write.
        """
        for folder in sorted(path for path in (self.out / TRIALS).glob("*") if path.is_dir()):
            sweep(folder)
            if (folder / RECORD).is_file():
                trial = read_record(self.out, folder.name)
                self._trials[trial.name] = replace(trial, state="waiting") if trial.state == "running" else trial

    def __iter__(self) -> Iterator[Trial]:
        with self._lock:
            return iter(sorted(self._trials.values(), key=lambda trial: trial.name))

    def __len__(self) -> int:
        return len(self._trials)

    def __contains__(self, name: str) -> bool:
        return name in self._trials

    def __getitem__(self, name: str) -> Trial:
        return self._trials[name]

    def put(self, trial: Trial) -> None:
        """Hold and keep `trial`.

        Raises:
            StorageError: it cannot be written.
        """
        folder = trial_folder(self.out, trial.name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error
        write_json(folder / RECORD, trial.record())
        with self._lock:
            self._trials[trial.name] = trial
            self.news += 1

    def change(self, name: str, **values: Any) -> None:
        """Hold and keep the trial `name` with other values."""
        self.put(replace(self[name], **values))

    def took(self, name: str, result: Mapping[str, Any], state: State) -> None:
        """One result of a trial: an epoch, its objective and metrics.

        Epochs from there on that were told before are forgotten: they were trained again after a crash, or the trial
        went on from another's checkpoint.
        """
        trial = self[name]
        if result.get("epoch") is None:  # it ended before its first
            self.change(name, state=state, reason=result.get("failed"), seconds=self._seconds(trial, result))
            return
        epoch = int(result["epoch"])
        curve = [point for point in trial.curve if point[0] < epoch]
        curve.append((epoch, float(result["objective"])))
        self.change(
            name,
            state=state,
            epochs=epoch,
            curve=curve,
            metrics=dict(result["metrics"]),
            parameters=dict(result["parameters"]),
            seconds=self._seconds(trial, result),
            reason=result.get("failed"),
        )

    @staticmethod
    def _seconds(trial: Trial, result: Mapping[str, Any]) -> float:
        return round(trial.seconds + float(result.get("seconds", 0.0)), 3)

    @property
    def n_sampled(self) -> int:
        """How many there are beside the defaults."""
        return len(self._trials) - (DEFAULTS in self._trials)

    def best(self) -> Trial | None:
        """The trial that reached the best objective; of equals the one that was trained longest."""
        ranked = self.ranked()
        return ranked[0] if ranked else None

    def ranked(self) -> list[Trial]:
        """The trials that have an objective and did not fail, the best first."""
        sign = 1.0 if self.mode == "min" else -1.0
        scored = [(trial.best(self.mode), trial) for trial in self if trial.state != "failed"]
        found = [(sign * value, -trial.epochs, trial.name, trial) for value, trial in scored if value is not None]
        return [trial for *_, trial in sorted(found, key=lambda entry: entry[:3])]

    def left(self) -> list[Trial]:
        """Those that are not over."""
        return [trial for trial in self if not is_over(trial)]
