"""Peak memory of streaming (and, with --train, of training) 100,000 and 1,000,000 cells x 2,000 genes.

    python -m benchmarks.memory --data FOLDER [--cells 100000 1000000] [--train] [--models scanvi totalvi]

Each runs in a process of its own; what is printed is that process's largest resident set. The bar: no more for a
million cells than for a hundred thousand, within 10 %, and under 2 GB. With --models those are trained for an epoch
of 40,000 and of 200,000 cells with labels and proteins, and written with the latent of all cells; the bar is 15 %.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.training import make
from scarcade.dataloaders.store import open_store

RESULTS = Path(__file__).parent / "results" / "memory.json"
FEW_AND_MANY = (40_000, 200_000)  # both more than the 32,768 cells that a window holds, of which there are two

SIMULATE = """
import sys
from scarcade.dataloaders.synthetic import simulate
simulate(sys.argv[1], cells=int(sys.argv[2]), genes=2000, seed=0)
"""
STREAM = """
import sys, torch
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import open_store
loader = stream(open_store(sys.argv[1]), "train", LoaderConfig(batch_size=1024), seed=0)
seen = sum(len(batch.counts.dense(torch.device("cpu"))) for batch in loader.epoch(0))
assert seen == loader.n_cells
"""
TRAIN = """
import sys, tempfile
import scarcade as sca
with tempfile.TemporaryDirectory() as out:
    programs = sys.argv[3:] or None
    sca.train(sys.argv[1], model=sys.argv[2], out=out + "/run", epochs=1, batch_size=1024, programs=programs)
"""
PEAK = """
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(program: str, *arguments: str) -> float:
    """MB at the most, of a process that runs `program`."""
    command = [sys.executable, "-c", program + PEAK, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment(OMP_NUM_THREADS=1))
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made data; kept for the next run")
    parser.add_argument("--cells", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--train", action="store_true", help="an epoch of scVI too")
    parser.add_argument("--models", nargs="+", help="the peak of training these, and nothing else")
    given = parser.parse_args()
    if given.models:
        of_models(given.data, given.models)
        return
    given.data.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for cells in given.cells:
        store = given.data / f"{cells}.zarr"
        row: dict[str, Any] = {"cells": cells}
        if not store.exists():
            row["simulate_mb"] = round(peak(SIMULATE, str(store), str(cells)))
        row["bytes_per_cell"] = round(sum(f.stat().st_size for f in store.rglob("*") if f.is_file()) / cells)
        assert open_store(store).n_cells == cells
        row["stream_mb"] = round(peak(STREAM, str(store)))
        if given.train:
            row["train_mb"] = round(peak(TRAIN, str(store), "scvi"))
        rows.append(row)
        print("   ".join(f"{name} {value:,}" for name, value in row.items()), flush=True)
    for what in ("simulate_mb", "stream_mb", "train_mb"):
        if len(rows) > 1 and what in rows[0] and what in rows[-1]:
            growth = rows[-1][what] / rows[0][what] - 1
            print(f"{what}: {growth:+.1%} from {rows[0]['cells']:,} to {rows[-1]['cells']:,} cells")
    keep({"genes": 2000, "batch_size": 1024, "rows": rows})


def of_models(folder: Path, models: Sequence[str]) -> None:
    """Peak memory of training each model on few and on many cells."""
    rows: list[dict[str, Any]] = []
    for model in models:
        row: dict[str, Any] = {"model": model}
        for cells in FEW_AND_MANY:
            store, _, programs = make(folder, cells, h5ad=False)
            extra = [str(programs)] if model == "expimap" else []
            row[f"train_{cells}_mb"] = round(peak(TRAIN, str(store), model, *extra))
        few, many = (row[f"train_{cells}_mb"] for cells in FEW_AND_MANY)
        row["growth"] = round(many / few - 1, 3)
        rows.append(row)
        print(f"{model:10}{few:7,} MB{many:7,} MB{row['growth']:+8.1%}", flush=True)
    keep({"models": rows})


def keep(found: dict[str, Any]) -> None:
    """Write what was found beside what other runs have found."""
    RESULTS.parent.mkdir(exist_ok=True)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**before, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
