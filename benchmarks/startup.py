"""Seconds until a command is of use: --help, the first step of a training, a mapped query, two Ray workers' first step.

    python -m benchmarks.startup [--times 5] [--no-ray]

Each is a process of its own, as a user starts it, with what numba compiled in an earlier start at hand. Medians of
seconds by the clock and, as other programs may be at work, of CPU seconds of the process and its children; for a first
step the CPU seconds are those of the whole run of one step. The bars are 0.4, 5, 6 and 20 s on a quiet machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import as_installed

RESULTS = Path(__file__).parent / "results" / "startup.json"
BARS = {"help": 0.4, "train, first step": 5.0, "map one query": 6.0, "2 Ray workers, first step": 20.0}


def run(*command: str | Path) -> tuple[float, float]:
    """(seconds, CPU seconds) of one command line."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "scarcade.jobs.cli", *map(str, command)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=as_installed(),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, used


def first_step(store: Path, out: Path, workers: int) -> tuple[float, float]:
    """(seconds until the first step is over, CPU seconds of the run)."""
    began = time.time()
    options = ("--optim.max-steps", "2", "--optim.log-every", "1", "--threads", "1", "--workers", str(workers))
    _, used = run("train", "--data", store, "--out", out, *options)
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return first["time"] - began, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--no-ray", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scarcade-startup-") as name:
        folder = Path(name)
        store, query, reference = folder / "a.zarr", folder / "q.zarr", folder / "reference"
        sizes = ("--genes", "500", "--batches", "2", "--labels", "3")
        run("simulate", store, "--cells", "4000", *sizes)
        run("simulate", query, "--cells", "300", *sizes, "--seed", "1")
        run("train", "--data", store, "--out", reference, "--recipe", "scarches", "--epochs", "2", "--threads", "1")
        number = iter(range(1_000))
        measured: dict[str, Callable[[], tuple[float, float]]] = {
            "help": lambda: run("--help"),
            "train, first step": lambda: first_step(store, folder / f"run{next(number)}", 0),
            "map one query": lambda: run(
                "map", reference / "model", query, "--out", folder / f"map{next(number)}", "--epochs", "2"
            ),
        }
        if not given.no_ray:
            measured["2 Ray workers, first step"] = lambda: first_step(store, folder / f"run{next(number)}", 2)
        found = {}
        print(f"{'':28}{'seconds':>9}{'CPU s':>8}{'bar':>7}")
        for what, once in measured.items():
            once()  # compiles, and brings files into memory
            times = [once() for _ in range(given.times)]
            clock, used = (statistics.median(values) for values in zip(*times, strict=True))
            found[what] = {"seconds": round(clock, 2), "cpu_seconds": round(used, 2), "bar": BARS[what]}
            print(f"{what:28}{clock:9.2f}{used:8.2f}{BARS[what]:7.1f}", flush=True)
    RESULTS.write_text(json.dumps({"load": os.getloadavg()[0], "times": given.times, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
