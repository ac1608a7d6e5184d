"""Cells per second of training every model, ours beside its original, on the same made counts.

    python -m benchmarks.training --data FOLDER [--peer-python PYTHON] [--models scvi totalvi] [--cells 20000]

The originals are scvi-tools 1.4.2 and, for trVAE, expiMap and scGen, scArches 0.6.1; they run in an environment of
their own (``pip install --no-deps scArches==0.6.1`` beside scvi-tools) and have their data in memory; ours are
streamed from the store. Architecture, batch size, likelihood, number of threads and the way that cells are drawn
(trVAE and expiMap: batches equally often) are the same: the original's defaults. All count the cells that are trained
on, leave out the first epoch, and run no validation in between. scGen's original takes time in proportion to all cells
for each batch, so only its first batches are timed. Rounds are interleaved; medians are taken, of speeds and of the
ratios of each round. Results are written where the originals ran (or with `--out`); rows of models that are not
measured now are kept. With `--beside N` N processes that only count compete for the cores, and results are told alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.precision import slow_in_bfloat16

RESULTS = Path(__file__).parent / "results" / "training.json"
WORKERS = Path(__file__).parent / "peers"
GENES, PROTEINS, LABELS, UNLABELLED = 2000, 14, 8, 0.2
PROGRAMS, PROGRAM_GENES = 200, 50  # of expiMap


@dataclass(frozen=True)
class Task:
    """One row: a model as its original is by default."""

    model: str
    original: str
    likelihood: str
    batch: int
    products: str = "float32"  # of ours (--optim.products)


TASKS = [
    Task("scvi", "scvi_tools", "zinb", 128),
    Task("scvi", "scvi_tools", "zinb", 1024),
    Task("scvi", "scvi_tools", "nb", 1024),
    Task("scvi", "scvi_tools", "zinb", 1024, "bfloat16"),
    Task("scvi", "scvi_tools", "nb", 1024, "bfloat16"),
    Task("scanvi", "scvi_tools", "zinb", 128),
    Task("scanvi", "scvi_tools", "zinb", 1024),
    Task("totalvi", "scvi_tools", "nb", 256),
    Task("totalvi", "scvi_tools", "nb", 1024),
    Task("trvae", "scarches", "nb", 128),
    Task("trvae", "scarches", "nb", 1024),
    Task("expimap", "scarches", "nb", 128),
    Task("expimap", "scarches", "nb", 1024),
    Task("scgen", "scarches", "mse", 32),
]


def make(folder: Path, cells: int, *, h5ad: bool = True) -> tuple[Path, Path, Path]:
    """The store, the same cells as .h5ad, and gene programs."""
    folder.mkdir(parents=True, exist_ok=True)
    store, beside, programs = (folder / name for name in (f"{cells}.zarr", f"{cells}.h5ad", "programs.gmt"))
    if not store.exists():
        simulate(store, cells=cells, genes=GENES, proteins=PROTEINS, labels=LABELS, unlabelled=UNLABELLED, seed=0)
    opened = open_store(store)
    if h5ad and not beside.exists():
        opened.to_anndata().write_h5ad(beside)
    if not programs.exists():
        rng = np.random.default_rng(0)
        chosen = (rng.choice(opened.schema.genes, PROGRAM_GENES, replace=False) for _ in range(PROGRAMS))
        programs.write_text("".join("\t".join((f"program{i}", "", *genes)) + "\n" for i, genes in enumerate(chosen)))
    return store, beside, programs


def measure(python: str, contender: str, data: Path, task: Task, **options: object) -> dict[str, float] | None:
    """One training in a process of its own; None with a line on stderr where it failed."""
    command = [python, str(WORKERS / f"training_{contender}.py"), task.model, str(data)]
    given = {"batch": task.batch, "likelihood": task.likelihood, "products": task.products, **options}
    for name, value in given.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    threads = environment(OMP_NUM_THREADS=options["threads"])
    done = subprocess.run(command, capture_output=True, text=True, env=threads, check=False)
    if done.returncode:
        print(f"{contender} {task.model} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@contextmanager
def busy(n: int) -> Iterator[None]:
    """`n` processes that only count, for as long as the block runs."""
    counting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for one in counting:
            one.kill()
            one.wait()


def medians(many: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(one[key] for one in many), 2) for key in (many[0] if many else ())}


def ratio(ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str) -> float:
    """The median over rounds: of those that ran one after the other, what else the machine did it did to both."""
    if len(ours) != len(theirs):  # one of them failed
        return round(medians(ours)[key] / medians(theirs)[key], 2)
    return round(statistics.median(one[key] / other[key] for one, other in zip(ours, theirs, strict=True)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made cells")
    parser.add_argument("--peer-python", help="interpreter of an environment with the originals")
    parser.add_argument("--models", nargs="+", choices=sorted({task.model for task in TASKS}))
    parser.add_argument("--defaults", action="store_true", help="each model's default batch size alone")
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=3, help="of the original; ours are trained for twice as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beside", type=int, default=0, help="busy processes that compete for the cores")
    parser.add_argument("--out", type=Path, help="default, with --peer-python: benchmarks/results/training.json")
    options = parser.parse_args()
    tasks = [task for task in TASKS if not options.models or task.model in options.models]
    if options.defaults:
        tasks = list({task.model: task for task in reversed(tasks)}.values())[::-1]
    if slow_in_bfloat16() and any(task.products == "bfloat16" for task in tasks):
        print("this processor has no units for bfloat16: those rows are left out", file=sys.stderr)
        tasks = [task for task in tasks if task.products != "bfloat16"]
    store, h5ad, programs = make(options.data, options.cells)
    found: dict[tuple[Task, str], list[dict[str, float]]] = {}
    for task in [task for _ in range(options.rounds) for task in tasks]:
        with busy(options.beside):
            runs = [("scarcade", sys.executable, store, 2 * options.epochs)]
            if options.peer_python:
                runs.append((task.original, options.peer_python, h5ad, options.epochs))
            for contender, python, data, epochs in runs:
                one = measure(python, contender, data, task, epochs=epochs, threads=options.threads, programs=programs)
                if one is not None:
                    found.setdefault((task, contender), []).append(one)
    rows = told(tasks, found, options)
    out = options.out or (RESULTS if options.peer_python and not options.beside else None)
    if out is None:
        return
    about = {"cells": options.cells, "genes": GENES, "proteins": PROTEINS, "labels": LABELS, "programs": PROGRAMS}
    about |= {"threads": options.threads, "cores": os.cpu_count()}
    before = json.loads(out.read_text())["rows"] if out.exists() else []
    measured = {task_of(row): row for row in before + rows}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({**about, "rows": list(measured.values())}, indent=1) + "\n")


def told(
    tasks: list[Task], found: dict[tuple[Task, str], list[dict[str, float]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Print the table, and return its rows."""
    rows: list[dict[str, Any]] = []
    print("| model | likelihood | batch | ours, cells/s | original, cells/s | times | per CPU-second | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for task in tasks:
        ours, theirs = (medians(found.get((task, who), [])) for who in ("scarcade", task.original))
        rows.append(
            {**asdict(task), "rounds": options.rounds, "epochs": options.epochs, "ours": ours, "theirs": theirs}
        )
        if theirs:
            both = found[task, "scarcade"], found[task, task.original]
            rows[-1]["times"] = ratio(*both, "cells_per_s")
            rows[-1]["times_per_cpu_s"] = ratio(*both, "cells_per_cpu_s")
        numbers = [f"{ours['cells_per_s']:,.0f}", f"{theirs['cells_per_s']:,.0f}" if theirs else ""]
        numbers += [str(rows[-1].get("times", "")), str(rows[-1].get("times_per_cpu_s", ""))]
        peak = f"{ours['peak_mb']:,.0f}" + (f", {theirs['peak_mb']:,.0f}" if theirs else "")
        kind = "" if task.products == "float32" else f", {task.products}"
        print(
            f"| {task.model} | {task.likelihood}{kind} | {task.batch} | " + " | ".join([*numbers, peak]) + " |",
            flush=True,
        )
    return rows


def task_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(part.name, part.default) for part in fields(Task))


if __name__ == "__main__":
    main()
