"""Rows dealt to threads: each once, and a failure in any of them is raised."""

from itertools import pairwise

import pytest
import torch

from scarcade.models.threads import run


def test_rows_are_dealt_once() -> None:
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            for n in (1, 31, 32, 33, 64, 100, 1000):
                seen: list[tuple[int, int]] = []
                run(n, lambda a, b, seen=seen: seen.append((a, b)))  # type: ignore[misc]
                seen.sort()
                assert seen[0][0] == 0
                assert seen[-1][1] == n
                assert all(a[1] == b[0] for a, b in pairwise(seen))
    finally:
        torch.set_num_threads(before)


def test_a_failure_in_a_thread_is_raised() -> None:
    def work(start: int, stop: int) -> None:
        if start > 0:
            raise ValueError("in a helper")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="in a helper"):
            run(100, work)
    finally:
        torch.set_num_threads(before)
