"""The likelihood alone: eager, analytic and fused, forward and backward, at several batch sizes and thread counts.

    python -m benchmarks.likelihood [--out benchmarks/results/likelihood.json]

Counts are made with 84 % zeros at 2,000 genes. Times are medians of the wall time; on one thread of that
thread's CPU time, which other work on the machine disturbs less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scarcade.models.distributions import Path as LikelihoodPath
from scarcade.models.distributions import log_likelihood
from scarcade.models.likelihood import FusedLikelihood
from scarcade.models.sparse import Sparse

N_GENES = 2000
PATHS: tuple[LikelihoodPath, ...] = ("eager", "analytic", "fused")


def made(n_cells: int, *, zinb: bool) -> list[Tensor | None]:
    """Counts, logits, log library, log theta, dropout logits."""
    g = torch.Generator().manual_seed(0)
    log_theta = torch.randn(N_GENES, generator=g)
    logits = torch.randn(n_cells, N_GENES, generator=g) * 1.5
    library = torch.full((n_cells,), 0.35 * N_GENES).log()
    rate = library.exp()[:, None] * torch.softmax(logits, -1)
    theta = log_theta.exp().expand_as(rate).contiguous()
    x = torch.poisson(torch._standard_gamma(theta, generator=g) * rate / theta, g)
    return [x, logits, library, log_theta, torch.randn(n_cells, N_GENES, generator=g) - 1 if zinb else None]


def likelihood(path: LikelihoodPath) -> Callable[..., Tensor]:
    """(counts, logits, log library, log theta, dropout logits) -> (B,), by one of the paths."""

    def plain(x: Tensor, logits: Tensor, library: Tensor, log_theta: Tensor, dropout: Tensor | None) -> Tensor:
        rate = library.exp()[:, None] * torch.softmax(logits, -1)
        return log_likelihood("nb" if dropout is None else "zinb", x, rate, log_theta, dropout, path=path)

    return FusedLikelihood.apply if path == "fused" else plain


def milliseconds(path: LikelihoodPath, n_cells: int, *, zinb: bool, n_threads: int) -> float:
    """Of one forward and backward pass."""
    torch.set_num_threads(n_threads)
    clock = time.thread_time if n_threads == 1 else time.perf_counter
    given = [None if p is None else p.clone().requires_grad_(i > 0) for i, p in enumerate(made(n_cells, zinb=zinb))]
    function, times = likelihood(path), []
    first: Any = given[0]
    counts = Sparse.of(first) if path == "fused" else first  # as the models give them
    for _ in range(max(5, 4000 // n_cells)):
        for part in given[1:]:
            if part is not None:
                part.grad = None
        start = clock()
        function(counts, *given[1:]).mean().backward()  # type: ignore[no-untyped-call]
        times.append(1e3 * (clock() - start))
    return statistics.median(times[1:])


def main() -> None:
    """Print the table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'':5} {'cells':>6} {'threads':>7}" + "".join(f" {path + ' ms':>12}" for path in PATHS) + "   gain")
    for zinb in (True, False):
        for n_cells in (128, 1024):
            for n_threads in arguments.threads:
                found = {p: milliseconds(p, n_cells, zinb=zinb, n_threads=n_threads) for p in PATHS}
                family = "zinb" if zinb else "nb"
                gain = found["eager"] / found["fused"]
                rows.append({"family": family, "cells": n_cells, "threads": n_threads, "gain": gain} | found)
                shown = "".join(f" {found[p]:12.2f}" for p in PATHS)
                print(f"{family:5} {n_cells:6} {n_threads:7}{shown} {gain:6.1f}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"genes": N_GENES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
