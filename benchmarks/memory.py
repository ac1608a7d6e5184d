"""Peak memory of streaming (and, with --train, of training) 100,000 and 1,000,000 cells x 2,000 genes.

    python -m benchmarks.memory --data FOLDER [--cells 100000 1000000] [--train]

Each runs in a process of its own; what is printed is that process's largest resident set. The bar: no more for a
million cells than for a hundred thousand, within 10 %, and under 2 GB.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from scarcade.dataloaders.store import open_store

RESULTS = Path(__file__).parent / "results" / "memory.json"

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
    sca.train(sys.argv[1], model="scvi", out=out + "/run", epochs=1, batch_size=1024)
"""
PEAK = """
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(program: str, *arguments: str) -> float:
    """MB at the most, of a process that runs `program`."""
    command = [sys.executable, "-c", program + PEAK, *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made data; kept for the next run")
    parser.add_argument("--cells", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--train", action="store_true", help="an epoch of scVI too")
    given = parser.parse_args()
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
            row["train_mb"] = round(peak(TRAIN, str(store)))
        rows.append(row)
        print("   ".join(f"{name} {value:,}" for name, value in row.items()), flush=True)
    for what in ("simulate_mb", "stream_mb", "train_mb"):
        if len(rows) > 1 and what in rows[0] and what in rows[-1]:
            growth = rows[-1][what] / rows[0][what] - 1
            print(f"{what}: {growth:+.1%} from {rows[0]['cells']:,} to {rows[-1]['cells']:,} cells")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"genes": 2000, "batch_size": 1024, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
