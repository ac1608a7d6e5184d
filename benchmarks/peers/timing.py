"""What every contender of ``benchmarks/training.py`` shares: its options, its clock, one JSON object at the end.

Imports nothing but the standard library, for it runs in the environments of all contenders.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Timer:
    """Wall and CPU seconds at the end of each epoch (or of each stretch of cells)."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def end(self) -> None:
        self.ends.append((time.perf_counter(), cpu()))

    def result(self, cells: int) -> dict[str, float]:
        """Of epochs of `cells` cells; the first (compilation, first touch of memory) is left out."""
        wall, used = (self.ends[-1][i] - self.ends[0][i] for i in (0, 1))
        seen = cells * (len(self.ends) - 1)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"cells_per_s": seen / wall, "cells_per_cpu_s": seen / used, "peak_mb": rss}


def programs(path: str) -> dict[str, list[str]]:
    """Gene programs of a .gmt file."""
    lines = (line.split("\t") for line in Path(path).read_text().splitlines())
    return {name: genes for name, _, *genes in lines}


def answer(models: Mapping[str, Callable[[argparse.Namespace], dict[str, float]]]) -> None:
    """Train what the command line asks for, and print the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=list(models))
    parser.add_argument("data")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--likelihood", default="zinb")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--products", default="float32", help="kind of number of large products (ours alone)")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU")
    parser.add_argument("--streamed", action="store_true", help="read each epoch from the store, also for a GPU (ours)")
    parser.add_argument("--programs", default="", help=".gmt file (expimap)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    print("\n" + json.dumps(models[options.model](options)))
