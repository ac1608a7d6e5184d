"""What a person sees: progress and warnings on stderr, results on stdout.

On a terminal progress is a bar that redraws itself; in a log it is a plain line every few seconds, with cells per
second and the time left. Nothing of other libraries' chatter reaches a user unless --debug asks for it.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds between two lines of progress in a log


def seconds(value: float) -> str:
    """``47 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = max(0, round(value))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Bar:
    """Progress of one piece of work, counted in cells (or another `unit`).

    ``bar(done, total)`` from wherever the work is done; safe to call often. Use as a context manager.
    """

    def __init__(self, title: str, *, unit: str = "cells", stream: TextIO | None = None) -> None:
        self.title = title
        self.unit = unit
        self._stream = stream or sys.stderr
        self._began = self._told = time.monotonic()
        self._first: int | None = None
        self._stage = ""
        self._shown: tuple[int, str] | None = None
        self._live: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._live = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._live.add_task(self.title, total=None, text="")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, done: int, total: int | None = None, text: str = "") -> None:
        now = time.monotonic()
        if self._first is None:  # work that was resumed does not count for the speed
            self._first, self._began = done, now
        speed = (done - self._first) / max(now - self._began, 1e-9)
        rate = f"{speed:,.0f} {self.unit}/s" if speed >= 1 else ""
        if self._live is not None:
            shown = ", ".join(part for part in (rate, text) if part)
            self._live.update(self._task, completed=done, total=total, text=shown)
            return
        if (now - self._told < LINE_EVERY and done != total) or (done, self._stage) == self._shown:
            return
        self._told, self._shown = now, (done, self._stage)
        of = f" of {total:,}" if total else ""
        left = f"{seconds((total - done) / speed)} left" if total and speed > 0 and done < total else ""
        parts = [f"{done:,}{of} {self.unit}", rate, left, text]
        self.line(f"{self.title}: {', '.join(part for part in parts if part)}")

    def stage(self, done: int, total: int, name: str, unit: str | None = None) -> None:
        """As calling it, for work in named stages: each is counted, and its speed measured, on its own."""
        if name != self._stage:
            self._stage, self._first, self.unit = name, None, unit or self.unit
        self(done, total, name)

    def ingesting(self, done: int, total: int, stage: str) -> None:
        """As `ingest` tells it: files are surveyed, cells are read and written."""
        self.stage(done, total, stage, "files" if stage == "survey" else "cells")

    def line(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)


def training_told(bar: Bar) -> Callable[[Mapping[str, Any]], None]:
    """Takes what `train` tells: sentences, and lines of metrics, which move `bar`."""

    def told(line: Mapping[str, Any]) -> None:
        for kind in ("note", "warning"):
            if kind in line:
                bar.line(line[kind] if kind == "note" else f"warning: {line[kind]}")
        if "epochs" not in line:
            return
        losses = [
            f"{name} {line[name]:.2f}" for name in ("train/elbo", "validation/elbo") if line.get(name) is not None
        ]
        epoch = min(line["epoch"] + 1, line["epochs"])
        steps = line["epochs"] * line["steps_per_epoch"]
        total = round(line["cells"] * steps / line["step"]) if line.get("step") else None
        wait = f"waiting for data {line['wait']:.0%}" if line.get("wait", 0) > 0.05 else ""
        text = ", ".join(part for part in (f"epoch {epoch} of {line['epochs']}", *losses, wait) if part)
        bar(int(line["cells"]), total, text)

    return told


def mapping_told(bar: Bar) -> Callable[[str, Mapping[str, Any]], None]:
    """Takes what `map_queries` tells of each query: a failure at once, and once what is true of many of them."""
    said: set[str] = set()

    def told(name: str, line: Mapping[str, Any]) -> None:
        if line.get("state") == "failed":
            bar.line(f"{name}: failed: {line['reason']}")
        elif line.get("state") == "done":
            bar.line(f"{name}: {line.get('reason') or 'done'}")
            for sentence in line.get("warnings", ()):
                if sentence not in said:
                    said.add(sentence)
                    bar.line(f"  note: {sentence}")
        elif "epochs" in line:
            bar.stage(int(line["epoch"]) + 1, int(line["epochs"]), name)
        elif "state" in line:
            bar.line(f"{name}: {line['state']}")

    return told


def mapping_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The queries of a mapping, a line each."""
    rows = []
    for one in records:
        labels = (one.get("labels") or {}).values()
        accuracy = ", ".join(f"{found['accuracy']:.3f}" for found in labels if "accuracy" in found)
        cells = f"{one['n_cells']:,}" if one.get("n_cells") is not None else ""
        genes = f"{one['genes_found']} of {one['genes_wanted']}" if one.get("genes_found") is not None else ""
        beyond = f"{100 * one['beyond']:.1f} %" if one.get("beyond") is not None else ""
        rows.append((one["name"], one["state"], cells, genes, beyond, accuracy, f"{one['seconds']:.1f}"))
    return table(("query", "state", "cells", "genes", "beyond", "accuracy", "seconds"), rows)


def note(text: str) -> None:
    """One line for the person at the terminal, beside the results."""
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Plain columns, numbers to the right: read by people, cut by awk, pasted into a letter."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *cells]) for i in range(len(head))]
    numeric = [bool(cells) and all(_numeric(row[i]) for row in cells) for i in range(len(head))]

    def told(line: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(line, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([told(head), told(["-" * width for width in widths]), *map(told, cells)])


def _numeric(text: str) -> bool:
    return text.replace(",", "").replace(".", "").replace("-", "").replace("%", "").isdigit() or text in ("", "nan")


def record(values: Mapping[str, Any]) -> str:
    """``name  value`` lines."""
    width = max((len(name) for name in values), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())


def only_our_warnings(debug: bool) -> None:
    """Show warnings that our own code gives, as one line each; drop those of other libraries unless `debug`."""
    if debug:
        return
    home = Path(__file__).resolve().parents[1]
    ours = [home / floor for floor in ("engine", "dataloaders", "models", "jobs")]

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        inside = any(Path(filename).resolve().is_relative_to(one) for one in ours)
        if inside or category.__module__.startswith("scarcade."):
            note(f"warning: {message}")

    warnings.simplefilter("ignore")
    warnings.simplefilter("default", UserWarning)
    warnings.showwarning = show
