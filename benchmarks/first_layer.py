"""A first layer's product with the counts and the gradient of its weights: dense, and without the zeros.

    python -m benchmarks.first_layer [--out benchmarks/results/first_layer.json]

Counts are made at a density that real ones have. Dense and sparse take turns on the same numbers; the medians of the
wall time are told, in milliseconds, and the median of the ratios of the two turns beside each other.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from scarcade.models.sparse import Sparse
from scarcade.models.sparse_product import SeenCounts

CASES = ((128, 2000, 128, 0.15), (1024, 2000, 128, 0.15), (1024, 2000, 128, 0.25), (1024, 20000, 128, 0.08))
TURNS = 25


def pair(dense: Callable[[], object], sparse: Callable[[], object]) -> tuple[float, float, float]:
    """(milliseconds dense, sparse, how many times as fast)."""
    times: list[tuple[float, float]] = []
    for _ in range(TURNS + 3):
        both = []
        for function in (dense, sparse):
            began = time.perf_counter()
            function()
            both.append(1e3 * (time.perf_counter() - began))
        times.append((both[0], both[1]))
    kept = times[3:]
    return (
        statistics.median(a for a, _ in kept),
        statistics.median(b for _, b in kept),
        statistics.median(a / b for a, b in kept),
    )


def measured(n_cells: int, n_genes: int, n_units: int, density: float) -> dict[str, tuple[float, float, float]]:
    """`pair` of the product and of the gradient."""
    random = np.random.default_rng(0)
    x = random.integers(1, 9, (n_cells, n_genes)) * (random.random((n_cells, n_genes)) < density)
    seen = SeenCounts.logs(Sparse.of(torch.from_numpy(x.astype(np.float32))))
    dense_BG, weight_HG, d_BH = seen.dense(), torch.randn(n_units, n_genes), torch.randn(n_cells, n_units)
    return {
        "product": pair(lambda: torch.mm(dense_BG, weight_HG.T), lambda: seen.times(weight_HG)),
        "gradient": pair(lambda: torch.mm(d_BH.T, dense_BG), lambda: seen.gradient(d_BH)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    print("threads   cells   genes  density |   dense  sparse  times |   dense  sparse  times")
    print("                                 |         product        |        gradient")
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        for case in CASES:
            found = measured(*case)
            n_cells, n_genes, n_units, density = case
            told = " | ".join(f"{dense:7.2f} {sparse:7.2f} {times:6.2f}" for dense, sparse, times in found.values())
            print(f"{n_threads:7} {n_cells:7,} {n_genes:7,} {density:8} | {told}", flush=True)
            about = {"threads": n_threads, "cells": n_cells, "genes": n_genes, "units": n_units, "density": density}
            rows.append(about | {name: [round(one, 2) for one in of_one] for name, of_one in found.items()})
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
