"""Packs hold every query once, and about as many cells each."""

import numpy as np
import pytest

from scarcade.jobs.packs import LARGE, MOST, ROUNDS, large_and_small, packs_of
from scarcade.jobs.queries import Task


def made(sizes: list[int]) -> tuple[list[Task], dict[str, int]]:
    tasks = [Task(f"q{i}", f"q{i}.h5ad") for i in range(len(sizes))]
    return tasks, {task.name: n for task, n in zip(tasks, sizes, strict=True)}


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_query_is_in_one_pack(workers: int) -> None:
    rng = np.random.default_rng(workers)
    tasks, sizes = made([0, 1, *rng.integers(1, 3000, 200).tolist(), 400_000])
    packs = packs_of(tasks, sizes, workers)
    assert sorted(task.name for pack in packs for task in pack) == sorted(sizes)
    assert all(1 <= len(pack) <= MOST for pack in packs)
    share = sum(sizes.values()) / (ROUNDS * workers)
    assert all(len(pack) == 1 or sum(sizes[task.name] for task in pack) <= share + 1 for pack in packs)
    assert [task.name for task in packs[0]] == ["q202"]  # the largest begins


def test_many_small_ones_are_enough_packs_for_all_workers() -> None:
    tasks, sizes = made([500] * 100)
    packs = packs_of(tasks, sizes, 4)
    assert {len(pack) for pack in packs} <= {6, 4}
    assert len(packs) == 17


def test_empty_ones_make_packs_too() -> None:
    assert packs_of([], {}, 2) == []
    tasks, sizes = made([0] * 40)
    assert [len(pack) for pack in packs_of(tasks, sizes, 2)] == [32, 8]


def test_large_ones_stand_apart() -> None:
    tasks, sizes = made([10, LARGE + 1, 500, 2 * LARGE, LARGE])
    large, small = large_and_small(tasks, sizes)
    assert [task.name for task in large] == ["q3", "q1"]
    assert [task.name for task in small] == ["q4", "q2", "q0"]
