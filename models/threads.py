"""Rows on threads: they are dealt in chunks to as many threads as torch is allowed.

What a thread does with torch for its own rows, it does alone: torch has one thread there.
"""

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
    return ThreadPoolExecutor(n, thread_name_prefix="rows", initializer=torch.set_num_threads, initargs=(1,))


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of these threads


def run(n_rows: int, work: Callable[[int, int], None]) -> None:
    """``work(start, stop)`` over all rows, on as many threads as torch is allowed, cut between chunks."""
    n_chunks = -(-n_rows // CHUNK)
    n_threads = max(1, min(torch.get_num_threads(), n_chunks))
    if n_threads == 1:
        work(0, n_rows)
        return
    cuts = [min(n_rows, CHUNK * (n_chunks * i // n_threads)) for i in range(n_threads)] + [n_rows]
    others = [_threads(n_threads - 1).submit(work, a, b) for a, b in pairwise(cuts[1:])]
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread: each has a number of its own
    try:
        work(cuts[0], cuts[1])
    finally:
        for other in others:
            other.exception()  # waits
        torch.set_num_threads(before)
    for other in others:
        other.result()
