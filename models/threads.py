"""Compiled code on threads: rows are dealt in chunks to as many threads as torch is allowed."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

from scarcade.models.likelihood_kernel import CHUNK


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    """Helpers of the calling thread; they sleep when there is nothing to do."""
    return ThreadPoolExecutor(n, thread_name_prefix="likelihood")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of these threads


def run(n_rows: int, work: Callable[[int, int], None]) -> None:
    """``work(start, stop)`` over all rows, on as many threads as torch is allowed, cut between chunks."""
    n_chunks = -(-n_rows // CHUNK)
    n_threads = max(1, min(torch.get_num_threads(), n_chunks))
    cuts = [min(n_rows, CHUNK * (n_chunks * i // n_threads)) for i in range(n_threads)] + [n_rows]
    others = [_threads(n_threads - 1).submit(work, a, b) for a, b in pairwise(cuts[1:])]
    work(cuts[0], cuts[1])
    for other in others:
        other.result()
