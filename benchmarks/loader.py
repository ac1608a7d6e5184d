"""Cells per CPU-second of our loader beside annbatch, scDataset and scvi-tools, on the same made cells, in one run.

    python -m benchmarks.loader --data FOLDER --annbatch-python PYTHON --peer-python PYTHON [--rounds 3] [--only 2k]

annbatch needs Python 3.12 and scDataset and scvi-tools an environment of their own, so each contender runs in a
process of the interpreter that has it (`benchmarks/peers/loading.py`); without an interpreter it is left out.
Rounds are interleaved and the median is taken, since machines are shared. annbatch reads our store, with its
defaults and tuned, through its zarrs pipeline; what it densifies with is scipy into a reused buffer, the best
there is on a CPU. The ceiling is our reading, decoding and densifying one after the other without any check.
Rows of a data set that is not measured now are kept. Without both peers the results are told and not written.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import environment
from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.synthetic import simulate

RESULTS = Path(__file__).parent / "results" / "loader.json"
WORKER = Path(__file__).parent / "peers" / "loading.py"
SETS = {"2k": {"cells": 300_000, "genes": 2_000}, "20k": {"cells": 50_000, "genes": 20_000, "library": 2_200.0}}
TASKS = ({"batch": 128}, {"batch": 1024}, {"batch": 1024, "csr": True})
SLOW = {"scdataset": 30_000, "scvi_tools": 60_000}  # cells after which these stop
SLOW_20K = 6_000


def make(folder: Path, names: list[str]) -> None:
    """The stores, and the same cells as .h5ad for those who cannot read them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        store = folder / f"{name}.zarr"
        if not store.exists():
            simulate(store, seed=0, **SETS[name])  # type: ignore[arg-type]
        h5ad = folder / f"{name}.h5ad"
        if not h5ad.exists():
            open_store(store).to_anndata().write_h5ad(h5ad)


def measure(python: str, contender: str, data: Path, task: dict[str, Any]) -> dict[str, float] | None:
    """One run in a process of its own; None with a line on stderr where it failed."""
    command = [python, str(WORKER), contender, str(data), "--batch", str(task["batch"])]
    command += ["--csr"] if task.get("csr") else []
    if contender in SLOW:
        command += ["--cells", str(SLOW_20K if data.stem == "20k" else SLOW[contender])]
    given = environment(OMP_NUM_THREADS=1, NUMBA_NUM_THREADS=1, HDF5_USE_FILE_LOCKING="FALSE")
    done = subprocess.run(command, capture_output=True, text=True, env=given, check=False)
    if done.returncode:
        print(f"{contender} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made data; kept for the next run")
    parser.add_argument("--annbatch-python", help="a Python 3.12 with annbatch and zarrs")
    parser.add_argument("--peer-python", help="a Python with scdataset and scvi-tools")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SETS, action="append")
    given = parser.parse_args()
    names = given.only or list(SETS)
    make(given.data, names)
    contenders = {"scarcade": (sys.executable, "zarr"), "ceiling": (sys.executable, "zarr")}
    contenders["scarcade_memory"] = (sys.executable, "h5ad")
    if given.annbatch_python:
        contenders |= dict.fromkeys(("annbatch", "annbatch_tuned"), (given.annbatch_python, "zarr"))
    if given.peer_python:
        contenders |= dict.fromkeys(("scdataset", "scvi_tools"), (given.peer_python, "h5ad"))

    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows: list[dict[str, Any]] = [row for row in old if row["data"] not in names]
    for name in names:
        for task in TASKS:
            runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
            for _ in range(given.rounds):
                for contender, (python, kind) in contenders.items():
                    if task.get("csr") and contender in ("ceiling", "scvi_tools"):
                        continue
                    result = measure(python, contender, given.data / f"{name}.{kind}", task)
                    runs[contender] += [result] if result else []
            ours = [run["cells_per_cpu_s"] for run in runs["scarcade"]]
            for contender, results in runs.items():
                if not results:
                    continue
                speeds = [run["cells_per_cpu_s"] for run in results]
                # of the rounds that ran side by side: what else the machine did then, it did to both
                ratio = statistics.median(a / b for a, b in zip(ours, speeds, strict=False))
                rows.append(
                    {
                        "data": name,
                        **task,
                        "loader": contender,
                        "cells_per_cpu_s": round(statistics.median(speeds)),
                        "ours_is_times": round(ratio, 2),
                        "peak_mb": round(max(run.get("peak_mb", 0.0) for run in results)),
                        "rounds": [round(speed) for speed in speeds],
                    }
                )
                row = rows[-1]
                print(
                    f"{name:4s} batch {task['batch']:5d} {'csr  ' if task.get('csr') else 'dense'} {contender:15s} "
                    f"{row['cells_per_cpu_s'] / 1000:9.1f} k cells/CPU-s   ours is {row['ours_is_times']:6.2f} times   "
                    f"peak {row['peak_mb']} MB",
                    flush=True,
                )
        if given.annbatch_python and given.peer_python:
            RESULTS.write_text(json.dumps({"sets": SETS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
