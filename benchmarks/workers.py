"""Cells per second of training with 1, 2, ... Ray workers of one thread each, and in one plain process.

    python -m benchmarks.workers --data FOLDER [--workers 0 1 2 4] [--cells 100000] [--batch 1024] [--epochs 3]

The global batch is the same for all. The first epoch (compilation) is left out; starting Ray is told apart. With
as many cores as workers, the bar is 1.5 times one worker for two; more workers than cores cannot be faster.
``--address`` measures on a running cluster, of several raylets on this machine too (``ray start`` for each).
``--limit`` also trains in two plain processes side by side that share nothing: what two cores of this machine, with its
memory and its clock, do at once. Workers that talk to each other cannot be faster than that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scarcade.dataloaders.synthetic import simulate
from scarcade.jobs.train import train

RESULTS = Path(__file__).parent / "results" / "workers.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made cells")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--likelihood", default="nb")
    parser.add_argument("--address", help="of a running cluster; default: private sessions")
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.data.mkdir(parents=True, exist_ok=True)
    store = options.data / f"workers-{options.cells}.zarr"
    if not store.exists():
        simulate(store, cells=options.cells, genes=2000, seed=0)
    if options.alone:
        print(measure(store, 0, options)[0])
        return
    side_by_side: list[float] = []
    speeds: dict[int, list[float]] = {n: [] for n in options.workers}
    starts: dict[int, list[float]] = {n: [] for n in options.workers}
    for _ in range(options.rounds):
        for n in options.workers:
            speed, start = measure(store, n, options)
            speeds[n].append(speed)
            starts[n].append(start)
        if options.limit:
            side_by_side.append(pair(options))
    rows = [
        {
            "workers": n,
            "cells_per_s": round(statistics.median(speeds[n])),
            "start_s": round(statistics.median(starts[n]), 1),
        }
        for n in options.workers
    ]
    one = next((row["cells_per_s"] for row in rows if row["workers"] == 1), None)
    print(f"{'workers':>8}{'cells/s':>10}{'times':>7}{'start s':>9}")
    for row in rows:
        times = row["cells_per_s"] / one if one else float("nan")
        print(f"{row['workers']:8}{row['cells_per_s']:10,}{times:7.2f}{row['start_s']:9}")
    limit = round(statistics.median(side_by_side)) if side_by_side else None
    if limit is not None:
        print(f"two plain processes side by side: {limit:,} cells/s, {limit / one if one else float('nan'):.2f} times")
    options.out.parent.mkdir(exist_ok=True)
    about = {"cells": options.cells, "genes": 2000, "batch": options.batch, "likelihood": options.likelihood}
    about["cluster"] = options.address is not None
    options.out.write_text(
        json.dumps({**about, "cores": os.cpu_count(), "two_plain_processes": limit, "rows": rows}, indent=1) + "\n"
    )


def pair(options: argparse.Namespace) -> float:
    """Cells per second of two plain processes together, each of which trains on all cells."""
    command = [sys.executable, "-m", "benchmarks.workers", "--alone", "--data", str(options.data)]
    command += ["--cells", str(options.cells), "--batch", str(options.batch), "--epochs", str(options.epochs)]
    command += ["--likelihood", options.likelihood]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return sum(float(one.communicate()[0].split()[-1]) for one in both)


def measure(store: Path, workers: int, options: argparse.Namespace) -> tuple[float, float]:
    """(cells per second after the first epoch, seconds until the end of the first epoch)."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        run = train(
            store,
            out=Path(folder) / "run",
            epochs=options.epochs,
            batch_size=options.batch,
            workers=workers,
            threads=1,
            settings={
                "model": {"gene_likelihood": options.likelihood, "use_batch_norm": "none", "use_layer_norm": "both"},
                "optim": {"validate_every": 0},
                "checkpoint": {"every_seconds": None},
                "scale": {"address": options.address} if workers else {},
            },
            progress=lambda _: None,
        )
    first, last = run.history[0], run.history[-1]
    return (last["cells"] - first["cells"]) / (last["time"] - first["time"]), first["time"] - began


if __name__ == "__main__":
    main()
