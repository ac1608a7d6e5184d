import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest

from scarcade.dataloaders.plan import Plan, lanes_for, permutation
from scarcade.engine.errors import UsageError
from scarcade.engine.schema import Shard

plans = st.builds(
    Plan,
    n_cells=st.integers(1, 3000),
    batch_size=st.integers(1, 300),
    lanes=st.integers(1, 17),
    window=st.integers(1, 2000),
    seed=st.integers(0, 1 << 40),
    shuffle=st.booleans(),
)


def steps_of(plan: Plan, epoch: int, shard: Shard, start: int = 0) -> list[tuple[np.ndarray, list[int]]]:
    """(rows, cells of each lane) of every step from `start` on."""
    out = []
    for window in range(plan.window_of(start), plan.n_windows):
        planned = plan.window_plan(epoch, window, shard)
        read = np.concatenate([np.arange(a, b) for a, b in planned.runs] or [np.zeros(0, int)])
        assert len(read) == planned.n_cells
        ends = np.concatenate([[0], np.cumsum(planned.counts.sum(axis=1))])
        for k in range(len(planned.counts)):
            if planned.first_step + k >= start:
                out.append((read[planned.order[ends[k] : ends[k + 1]]], planned.counts[k].tolist()))
    return out


@settings(max_examples=150, deadline=None)
@given(plans, st.integers(0, 5))
def test_every_cell_once_an_epoch_in_equal_steps(plan: Plan, epoch: int) -> None:
    steps = steps_of(plan, epoch, Shard())
    assert len(steps) == plan.steps
    sizes = {len(rows) for rows, _ in steps}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= plan.batch_size
    assert np.array_equal(np.sort(np.concatenate([rows for rows, _ in steps])), np.arange(plan.n_cells))


@settings(max_examples=60, deadline=None)
@given(plans, st.sampled_from([2, 3, 4, 6]), st.integers(0, 3))
def test_any_number_of_workers_sees_the_same_batches(plan: Plan, workers: int, epoch: int) -> None:
    if workers > plan.lanes:
        with pytest.raises(UsageError, match="lanes"):
            plan.window_plan(epoch, 0, Shard(0, workers))
        return
    alone = steps_of(plan, epoch, Shard())
    parts = [steps_of(plan, epoch, Shard(rank, workers)) for rank in range(workers)]
    assert {len(part) for part in parts} == {plan.steps}
    for step, (rows, counts) in enumerate(alone):
        # not only the same cells: the cells of each lane in the same order
        lanes: dict[int, np.ndarray] = {}
        for rank, part in enumerate(parts):
            own, own_counts = part[step]
            split = np.split(own, np.cumsum(own_counts)[:-1])
            lanes |= {rank + k * workers: cells for k, cells in enumerate(split)}
        assert [len(lanes[lane]) for lane in range(plan.lanes)] == counts
        assert np.array_equal(np.concatenate([lanes[lane] for lane in range(plan.lanes)]), rows)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 3), st.floats(0, 1))
def test_an_epoch_can_be_entered_anywhere(plan: Plan, epoch: int, where: float) -> None:
    start = min(plan.steps - 1, int(where * plan.steps))
    whole = steps_of(plan, epoch, Shard())[start:]
    tail = steps_of(plan, epoch, Shard(), start)
    assert len(whole) == len(tail)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(whole, tail, strict=True))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(seed: int, epoch: int) -> np.ndarray:
        return np.concatenate([rows for rows, _ in steps_of(Plan(1000, 50, seed=seed), epoch, Shard())])

    assert np.array_equal(order(1, 2), order(1, 2))
    for other in (order(1, 3), order(2, 2)):
        assert (order(1, 2) == other).mean() < 0.02


def test_without_shuffling_one_lane_keeps_the_order_on_disk() -> None:
    plan = Plan(1000, 64, lanes=1, window=200, shuffle=False)
    assert np.array_equal(np.concatenate([rows for rows, _ in steps_of(plan, 3, Shard())]), np.arange(1000))
    assert plan.window_plan(0, 0, Shard()).runs == ((0, plan.cells_before(plan.steps_per_window)),)


def test_reading_is_in_long_runs() -> None:
    plan = Plan(500_000, 128, seed=3)
    runs = [b - a for window in range(3) for a, b in plan.window_plan(0, window, Shard()).runs]
    assert np.mean(runs) > 1500


def test_what_follows_in_the_batch_says_nothing_about_the_place_on_disk() -> None:
    """Within a batch the places on disk are as those of cells drawn at random, as far as one window reaches."""
    plan = Plan(20_000, 100, window=20_000, seed=5)
    rows = np.stack([rows for rows, _ in steps_of(plan, 0, Shard())])
    # neighbours on disk meet in a batch as often as any two cells do
    batch = np.empty(plan.n_cells, int)
    batch[rows.ravel()] = np.repeat(np.arange(plan.steps), rows.shape[1])
    together = int((batch[1:] == batch[:-1]).sum())
    assert abs(together - plan.n_cells / plan.steps) < 4 * np.sqrt(plan.n_cells / plan.steps)
    # each batch covers the disk evenly
    for places in rows[:20]:
        assert kstest(places / plan.n_cells, "uniform").pvalue > 1e-4
    # and where a cell comes in the epoch has nothing to do with where it lies
    assert abs(np.corrcoef(batch, np.arange(plan.n_cells))[0, 1]) < 0.05


def test_batches_of_two_epochs_share_no_more_cells_than_chance() -> None:
    """Blocks are permuted and cells are shuffled: the batch of one epoch does not come back in the next."""
    plan = Plan(50_000, 100, window=10_000, seed=1)
    batches = np.empty((2, plan.n_cells), int)
    for epoch in range(2):
        for step, (rows, _) in enumerate(steps_of(plan, epoch, Shard())):
            batches[epoch, rows] = step
    pairs = np.unique(batches[0] * plan.steps + batches[1], return_counts=True)[1]
    # of the 100 cells of a batch, at random 0.2 would meet in a given batch; in windows of a fifth, about 1
    assert pairs.max() < 15


def test_permutation_is_uniform_and_fixed() -> None:
    assert permutation(10, np.uint64(42)).tolist() == [8, 3, 6, 5, 4, 0, 9, 2, 1, 7]
    firsts = np.bincount([permutation(6, np.uint64(s * 7919 + 1))[0] for s in range(6000)], minlength=6)
    statistic = ((firsts - 1000) ** 2 / 1000).sum()
    assert statistic < chi2.ppf(0.9999, 5)
    assert len(permutation(0, np.uint64(0))) == 0


def test_lanes_for() -> None:
    assert [lanes_for(n) for n in (0, 1, 8, 9, 16, 17)] == [8, 8, 8, 16, 16, 32]


@pytest.mark.parametrize("wrong", [{"n_cells": 0}, {"batch_size": 0}, {"lanes": 0}, {"window": 0}, {"seed": -1}])
def test_impossible_plans_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", ".")):
        Plan(**{"n_cells": 10, "batch_size": 2} | wrong)  # type: ignore[arg-type]
