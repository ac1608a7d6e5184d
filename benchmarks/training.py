"""Cells per second of training scVI, ours beside scvi-tools, on the same made counts and for the same epochs.

    python -m benchmarks.training --data FOLDER --peer-python PYTHON [--cells 30000] [--rounds 3] [--threads 2]

scvi-tools runs in its own environment and has its data in memory; ours are streamed from the store. Both count
the cells that are trained on (90 %), leave out the first epoch, and run no validation in between. Rounds are
interleaved and the median is taken.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.synthetic import simulate

RESULTS = Path(__file__).parent / "results" / "training.json"
WORKER = Path(__file__).parent / "peers" / "training.py"


def make(folder: Path, cells: int) -> tuple[Path, Path]:
    """The store and the same cells as .h5ad."""
    folder.mkdir(parents=True, exist_ok=True)
    store, h5ad = folder / f"{cells}.zarr", folder / f"{cells}.h5ad"
    if not store.exists():
        simulate(store, cells=cells, genes=2000, seed=0)
    if not h5ad.exists():
        open_store(store).to_anndata().write_h5ad(h5ad)
    return store, h5ad


def measure(python: str, contender: str, data: Path, options: dict[str, object]) -> dict[str, float] | None:
    """One training in a process of its own; None with a line on stderr where it failed."""
    command = [python, str(WORKER), contender, str(data)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options["threads"])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        print(f"{contender} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made cells")
    parser.add_argument("--peer-python", help="interpreter of an environment with scvi-tools")
    parser.add_argument("--cells", type=int, default=30_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    store, h5ad = make(options.data, options.cells)
    runs = {"ours": (sys.executable, store)}
    if options.peer_python:
        runs["scvi_tools"] = (options.peer_python, h5ad)
    tasks = [
        {"batch": batch, "likelihood": likelihood, "epochs": options.epochs, "threads": options.threads}
        for batch, likelihood in product((128, 1024), ("zinb", "nb"))
    ]
    table = []
    print(f"{'':24}{'cells/s':>10}{'cells/CPU-s':>13}{'peak MB':>9}{'-elbo':>9}{'times':>7}")
    for task in tasks:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, (python, data) in runs.items():
                if (one := measure(python, name, data, task)) is not None:
                    found[name].append(one)
        medians = {
            name: {key: statistics.median(one[key] for one in many) for key in many[0]}
            for name, many in found.items()
            if many
        }
        peer = medians.get("scvi_tools")
        for name, row in medians.items():
            times = row["cells_per_s"] / peer["cells_per_s"] if peer else float("nan")
            label = f"{name} {task['likelihood']} {task['batch']}"
            print(
                f"{label:24}{row['cells_per_s']:10,.0f}{row['cells_per_cpu_s']:13,.0f}{row['peak_mb']:9,.0f}"
                f"{row['last']:9.1f}{times:7.2f}",
                flush=True,
            )
            table.append({"contender": name, **task, **{key: round(value, 2) for key, value in row.items()}})
    options.out.parent.mkdir(exist_ok=True)
    about = {"cells": options.cells, "genes": 2000, "rounds": options.rounds, "machine": platform.processor()}
    options.out.write_text(json.dumps({**about, "cores": os.cpu_count(), "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
