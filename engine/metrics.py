"""Running means that cost no synchronisation, and the file of JSON lines that they end in."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scarcade.engine.contracts import Losses
from scarcade.engine.errors import StorageError
from scarcade.engine.folder import write_bytes
from scarcade.engine.world import World

Line = dict[str, Any]
TOGETHER = 32  # batches whose terms are added up at once: a handful of operations less in each step
_LABELLED = "labelled:"  # begins the names of sums over the labelled cells that came beside the others
_N_LABELLED = _LABELLED + "cells"
Report = Callable[[Mapping[str, Any]], None]
"""Takes one line of metrics as it is written, to show it."""


class Sums:
    """Sums over cells of named terms and the number of cells, held in float64 where the model is.

    Nothing is read back before `merged`, so a GPU is never waited for. Sums and counts, not means, are
    merged over workers, so batches of unlike size weigh by their cells.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._waiting: list[list[Tensor]] = []  # of each batch its terms, in the order of the names
        self._sums: Tensor | None = None
        self._cells = 0
        self._labelled: Sums | None = None  # terms of the labelled cells beside

    @torch.no_grad()
    def add(self, losses: Losses) -> None:
        """Take in a batch: each term, and what is minimised under the name ``loss``."""
        terms = {"loss": losses.minimise, **losses.terms}
        self._names = self._names or list(terms)
        self._waiting.append([terms[name].detach() for name in self._names])
        self._cells += len(losses.minimise)
        if len(self._waiting) == TOGETHER:
            self._add_up()
        if losses.labelled is not None:
            self._labelled = self._labelled or Sums()
            self._labelled.add(Losses(losses.labelled, losses.labelled_terms))

    def add_sums(self, names: Sequence[str], sums: Tensor, cells: int) -> None:
        """Take in what was summed over `cells` elsewhere, float64 in the order of `names`."""
        self._names = self._names or list(names)
        assert self._names == list(names)
        self._sums = sums if self._sums is None else self._sums + sums
        self._cells += cells

    def add_labelled_sums(self, names: Sequence[str], sums: Tensor, cells: int) -> None:
        """The same of the labelled cells beside."""
        self._labelled = self._labelled or Sums()
        self._labelled.add_sums(names, sums, cells)

    def _add_up(self) -> None:
        if not self._waiting:
            return
        of_names = [torch.cat(terms).sum(dtype=torch.float64) for terms in zip(*self._waiting, strict=True)]
        self._waiting = []
        sums = torch.stack(of_names)
        self._sums = sums if self._sums is None else self._sums + sums

    def merged(self, world: World) -> tuple[dict[str, float], int]:
        """(sums, cells) over all workers; this worker's sums begin anew."""
        self._add_up()
        if self._sums is None:
            return {}, 0
        count = torch.tensor([self._cells], dtype=torch.float64, device=self._sums.device)
        *sums, cells = world.sum(torch.cat([self._sums, count])).tolist()
        self._sums = torch.zeros_like(self._sums)
        self._cells = 0
        found = dict(zip(self._names, sums, strict=True))
        if self._labelled is not None:
            beside, n = self._labelled.merged(world)
            found |= {_LABELLED + name: value for name, value in beside.items()} | {_N_LABELLED: float(n)}
        return found, int(cells)


def means(sums: Mapping[str, float], cells: int, prefix: str) -> Line:
    """``{"train/loss": ...}`` from sums and the number of cells; what labelled cells add to the loss is in it."""
    line = {}
    beside = {name: value for name, value in sums.items() if name.startswith(_LABELLED)}
    for name, value in sums.items():
        if name not in beside:
            line[f"{prefix}/{name}"] = value / max(cells, 1)
    n_labelled = max(beside.pop(_N_LABELLED, 0.0), 1.0)
    for name, value in beside.items():
        name = f"{prefix}/{name.removeprefix(_LABELLED)}"
        line[name] = line.get(name, 0.0) + value / n_labelled
    return line


class Clock:
    """Cells per second and the share of time spent waiting for data, since it was last read."""

    def __init__(self, waited: float, cells: int) -> None:
        self._last = (time.perf_counter(), waited, cells)

    def read(self, waited: float, cells: int) -> Line:
        now = time.perf_counter()
        then, waited_then, cells_then = self._last
        self._last = (now, waited, cells)
        elapsed = max(now - then, 1e-9)
        return {
            "cells_per_s": round((cells - cells_then) / elapsed, 1),
            "wait": round(min(max((waited - waited_then) / elapsed, 0.0), 1.0), 4),
        }


class MetricsFile:
    """``metrics.jsonl`` of a run: one object a line, only ever appended to, rewound when a run resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Append `line`; a number that is not finite stands as null.

        Raises:
            StorageError: the file cannot be written.
        """
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean, allow_nan=False) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from error

    def rewind(self, step: int) -> None:
        """Drop the lines beyond `step`, and a last line that was cut by a kill."""
        if not self.path.exists():
            return
        kept = [line for line in self.read() if line.get("step", 0) <= step]
        write_bytes(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept).encode())

    def read(self) -> Iterator[Line]:
        """The lines that are whole."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8") as file:
            for text in file:
                if text.endswith("\n"):
                    yield json.loads(text)

    def follow(self, offset: int) -> tuple[list[Line], int]:
        """Whole lines written beyond byte `offset`, and the new offset: how a driver watches its workers."""
        try:
            size = os.path.getsize(self.path)
        except OSError:
            return [], 0
        if size <= offset:
            return [], min(offset, size)
        with open(self.path, "rb") as file:
            file.seek(offset)
            content = file.read(size - offset)
        whole = content[: content.rfind(b"\n") + 1]
        return [json.loads(text) for text in whole.splitlines()], offset + len(whole)


def epoch_lines(lines: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The lines that stand for a whole epoch."""
    return [dict(line) for line in lines if line.get("of") == "epoch"]
