"""Progress of a search: one table that redraws itself on a terminal, plain lines in a log."""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from scarcade.jobs.console import LINE_EVERY, Bar, training_told
from scarcade.jobs.tune_trial import Trial

_ROWS = 16  # of the table, so that it fits on a screen: those that run, then the best
_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "stopped": "dim", "waiting": "dim"}


class SearchTable:
    """Takes what `tune` tells. Use as a context manager."""

    def __init__(self, *, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live: Live | None = None
        self._bar: Bar | None = None
        self._about: Mapping[str, Any] = {"n_trials": 0, "epochs": 0, "title": "objective", "mode": "min"}
        self._states: dict[str, str] = {}
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._live = Live(console=Console(file=self._stream), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    def _end(self) -> None:
        """Take the table off the terminal."""
        if self._live is not None:
            self._live.stop()
        self._live = None

    def __call__(self, told: Mapping[str, Any]) -> None:
        """A sentence, what the search is (``about``), where its trials stand, or a line of training the reference."""
        if "about" in told:
            self._about = told["about"]
        if "epochs" in told:
            if self._bar is None:
                self._end()
                self._bar = Bar("training the reference", stream=self._stream).__enter__()
            training_told(self._bar)(told)
            return
        for kind in ("note", "warning"):
            if kind in told:
                self._line(told[kind] if kind == "note" else f"warning: {told[kind]}")
        if "trials" in told:
            self._show(told["trials"])

    def _show(self, trials: Sequence[Trial]) -> None:
        if self._live is not None:
            self._live.update(self._table(trials), refresh=True)
            return
        for trial in trials:
            before = self._states.get(trial.name)
            self._states[trial.name] = trial.state
            if before is not None and before != trial.state and trial.state in ("done", "stopped"):
                self._line(f"{trial.name}: {trial.state} after {trial.epochs} epochs, {self._objective(trial)}")
        if time.monotonic() - self._told > LINE_EVERY:
            self._told = time.monotonic()
            self._line(self._summary(trials))

    def _line(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def _mode(self) -> Literal["min", "max"]:
        return "max" if self._about["mode"] == "max" else "min"

    def _objective(self, trial: Trial) -> str:
        value = trial.best(self._mode())
        return "" if value is None else f"{self._about['title']} {value:.6g}"

    def _summary(self, trials: Sequence[Trial]) -> str:
        counts = Counter(trial.state for trial in trials)
        parts = [f"{counts[state]} {state}" for state in ("done", "stopped", "failed", "running") if counts[state]]
        ranked = self._ranked(trials)
        best = f"; best {self._objective(ranked[0])} ({ranked[0].name})" if ranked else ""
        return f"{self._about['n_trials']} trials: {', '.join(parts) or 'starting'}{best}"

    def _ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        sign = 1.0 if self._mode() == "min" else -1.0
        scored = [(trial.best(self._mode()), trial) for trial in trials if trial.state != "failed"]
        return [t for _, t in sorted(((sign * v, t) for v, t in scored if v is not None), key=lambda pair: pair[0])]

    def _table(self, trials: Sequence[Trial]) -> Table:
        table = Table(title=self._summary(trials), title_justify="left", box=None, pad_edge=False)
        for head in ("trial", "state", "epoch", str(self._about["title"]), "seconds"):
            table.add_column(head, justify="left" if head in ("trial", "state") else "right")
        fields = list(dict.fromkeys(name for trial in trials for name in trial.parameters))
        for field in fields:
            table.add_column(field, justify="right")
        running = [trial for trial in trials if trial.state == "running"]
        shown = dict.fromkeys(trial.name for trial in (*running, *self._ranked(trials)))
        by_name = {trial.name: trial for trial in trials}
        for name in list(shown)[:_ROWS]:
            trial = by_name[name]
            value = trial.best(self._mode())
            row = [name, f"[{_COLOURS[trial.state]}]{trial.state}[/]", f"{trial.epochs} of {self._about['epochs']}"]
            row += ["" if value is None else f"{value:.6g}", f"{trial.seconds:.0f}"]
            table.add_row(*row, *(_short(trial.parameters.get(field)) for field in fields))
        return table


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("[", "\\[")
