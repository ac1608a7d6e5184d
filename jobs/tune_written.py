"""What a search leaves for people and for the next command: tables of its trials, and the best as a configuration."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scarcade.engine.folder import write_bytes, write_json
from scarcade.jobs.train_config import TrainConfig, to_toml
from scarcade.jobs.tune_board import Board

CSV, JSON, BEST, REPORT = "trials.csv", "trials.json", "best.toml", "report.html"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would take for one


def write_tables(board: Board, about: Mapping[str, Any]) -> None:
    """``trials.csv`` and ``trials.json``.

    Args:
        about: what stands in the JSON beside the trials.
    """
    trials = list(board)
    write_json(board.out / JSON, {**about, "trials": [trial.record() for trial in trials]})
    parameters = list(dict.fromkeys(name for trial in trials for name in trial.parameters))
    metrics = sorted({name for trial in trials for name in trial.metrics})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", "state", "epochs", "objective", "last", "seconds", *parameters, *metrics, "reason"])
    for trial in trials:
        best, last = trial.best(board.mode), trial.curve[-1][1] if trial.curve else None
        row = [trial.name, trial.state, trial.epochs, best, last, trial.seconds]
        row += [trial.parameters.get(name) for name in parameters] + [trial.metrics.get(name) for name in metrics]
        table.writerow([_plain(value) for value in [*row, trial.reason]])
    write_bytes(board.out / CSV, text.getvalue().encode())


def _plain(value: Any) -> Any:
    """Text that begins like a formula gets a quote before it, and stays on one line."""
    if not isinstance(value, str):
        return value
    text = " ".join(value.split())
    return f"'{text}" if text.startswith(_FORMULA) else text


def write_best(out: Path, config: TrainConfig, sentence: str) -> None:
    """``best.toml``, which ``scarcade train --config`` takes; `sentence` stands above it.

    How the trials were computed is left out: a reference is trained with what the machine has.
    """
    plain = config.model_copy(update={"scale": type(config.scale)(), "checkpoint": type(config.checkpoint)()})
    write_bytes(out / BEST, f"# {sentence}\n{to_toml(plain)}".encode())
