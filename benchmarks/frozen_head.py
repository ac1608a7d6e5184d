"""The last layer and the likelihood of a frozen decoder: as one function, and by the layers with the fused likelihood.

    python -m benchmarks.frozen_head

Forward and backward of 512 made cells x 2,000 genes on one thread, as surgery has them: a gradient by the hidden units
alone. CPU time, medians of interleaved rounds, microseconds a cell; results are written to
``benchmarks/results/frozen_head.json``.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from scarcade.models.frozen_head import FrozenHead
from scarcade.models.layers import Linear, seeded
from scarcade.models.likelihood import FusedLikelihood

RESULTS = Path(__file__).parent / "results" / "frozen_head.json"
CELLS, GENES, HIDDEN, ROUNDS = 512, 2000, 128, 30


class Counts:
    """Counts of a batch, as a loader gives them."""

    def __init__(self, matrix: sp.csr_matrix) -> None:
        self.shape = matrix.shape
        self._parts = matrix.indptr.astype(np.int64), matrix.indices.astype(np.uint16), matrix.data

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._parts

    def dense(self, device: torch.device) -> Tensor:
        raise NotImplementedError

    def log1p(self, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
        raise NotImplementedError


def measured(ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.process_time()
            way().sum().backward()
            took[name].append(time.process_time() - began)
    return {name: round(1e6 * statistics.median(times[2:]) / CELLS, 2) for name, times in took.items()}


def row(zinb: bool) -> dict[str, float]:
    generator, rng = seeded("benchmark", zinb), np.random.default_rng(0)
    scale = Linear(HIDDEN, GENES, generator).requires_grad_(False)
    dropout = Linear(HIDDEN, GENES, generator).requires_grad_(False) if zinb else None
    head = FrozenHead(scale, dropout, torch.randn(GENES, generator=generator))
    matrix = sp.csr_matrix(rng.poisson(rng.gamma(0.14, 1.5, size=(CELLS, GENES))).astype(np.uint16))
    counts, x = Counts(matrix), torch.from_numpy(matrix.toarray().astype(np.float32))
    h = torch.randn(CELLS, HIDDEN, generator=generator).relu_().requires_grad_(True)
    library = x.sum(1).log()
    constants = head.constants(counts)

    def layers() -> Tensor:
        extra = None if dropout is None else dropout(h)
        return FusedLikelihood.apply(x, scale(h), library, head.log_theta_G, extra)

    ways = {"one_function": lambda: head.log_p(h, counts, library, constants), "layers": layers}
    found = measured(ways)
    density = matrix.nnz / CELLS / GENES
    return {**found, "times": round(found["layers"] / found["one_function"], 2), "density": round(density, 3)}


def main() -> None:
    torch.set_num_threads(1)
    found = {name: row(zinb) for name, zinb in (("nb", False), ("zinb", True))}
    print("| | one function, us/cell | layers and fused likelihood, us/cell | times |\n|---|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {values['one_function']} | {values['layers']} | {values['times']} |")
    RESULTS.write_text(json.dumps({"cells": CELLS, "genes": GENES, "hidden": HIDDEN, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
