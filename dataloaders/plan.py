"""The order of cells as pure arithmetic: (sizes, seed, epoch, step, shard) -> which rows, when.

An epoch is a permutation of blocks of rows, read as one sequence of N cells. It is cut into L equal stretches,
the lanes; the *global order* deals one cell from each lane in turn, so that global position g lies in lane
g mod L at place g div L. Step s of S = ceil(N / batch size) takes the global positions s N div S to
(s + 1) N div S. Within a window of whole steps the cells of a lane are shuffled. A worker takes lanes
rank, rank + size, ...; so the batches are the same for any number of workers, and a position is two integers.
See docs/decisions/001-order-lanes-noise.md.

Random numbers are splitmix64 started from a `SeedSequence`, whose outputs numpy promises never to change.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit

from scarcade.engine.errors import UsageError
from scarcade.engine.schema import Shard

BLOCK = 4096  # rows that stay together on disk: enough chunks that those cut at the edges cost little
_BLOCKS_PER_LANE = 4  # small data are cut finer, so that lanes differ between epochs
_EPOCH, _WINDOW = 0, 1  # what a seed is for


def lanes_for(workers: int) -> int:
    """8, or the next power of two that is not less than `workers`."""
    return max(8, 1 << max(0, workers - 1).bit_length())


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """What one worker reads and hands out in one window."""

    first_step: int
    runs: tuple[tuple[int, int], ...]  # ranges of rows, in the order in which they are read
    order: np.ndarray  # int64 (n,): batch by batch, lane by lane, places in the order of reading
    counts: np.ndarray  # int64 (steps, lanes of this worker): cells of each lane in each step
    lanes: tuple[int, ...]  # lanes of this worker

    @property
    def n_cells(self) -> int:
        return len(self.order)


@dataclass(frozen=True)
class Plan:
    """Which of `n_cells` cells come when. Rows are counted from 0; the reader adds where its range begins."""

    n_cells: int
    batch_size: int
    lanes: int = 8
    window: int = 32768  # cells, over all workers
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name in ("n_cells", "batch_size", "lanes", "window"):
            if getattr(self, name) < 1:
                raise UsageError(f"a plan with {name} = {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise UsageError(f"a seed of {self.seed}; it must not be negative")

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same for every worker."""
        return -(-self.n_cells // self.batch_size)

    @property
    def steps_per_window(self) -> int:
        return max(1, self.window // self.batch_size)

    @property
    def n_windows(self) -> int:
        return -(-self.steps // self.steps_per_window)

    @property
    def block(self) -> int:
        """Rows of a block."""
        return min(BLOCK, max(1, self.n_cells // (self.lanes * _BLOCKS_PER_LANE)))

    def cells_before(self, step: int) -> int:
        """Cells of an epoch, over all workers, in the steps before `step`."""
        return step * self.n_cells // self.steps

    def bounds(self, first: int, last: int) -> np.ndarray:
        """`cells_before` of the steps from `first` to `last`, both of them, int64."""
        steps = np.arange(first, last + 1)
        return steps * (self.n_cells // self.steps) + steps * (self.n_cells % self.steps) // self.steps

    def _lane_start(self, lane: int) -> int:
        """Where the stretch of `lane` begins in the sequence of blocks."""
        return lane * (self.n_cells // self.lanes) + min(lane, self.n_cells % self.lanes)

    @cached_property
    def _n_blocks(self) -> int:
        return -(-self.n_cells // self.block)

    def blocks(self, epoch: int) -> np.ndarray:
        """The blocks of `epoch` in their order, int64."""
        if not self.shuffle:
            return np.arange(self._n_blocks)
        return permutation(self._n_blocks, _state(self.seed, _EPOCH, epoch))

    def _runs(self, blocks: np.ndarray, tail_at: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The ranges of rows that stand at [start, stop) of the sequence of `blocks`."""
        size = self.block
        missing = self._n_blocks * size - self.n_cells  # what the last block lacks to a whole one
        while start < stop:
            shift = missing if start >= (tail_at + 1) * size - missing else 0
            at, inside = divmod(start + shift, size)
            first = int(blocks[at]) * size
            end = min(first + size, self.n_cells)
            take = min(stop - start, end - first - inside)
            yield first + inside, first + inside + take
            start += take

    def window_of(self, step: int) -> int:
        """The window that `step` lies in."""
        return step // self.steps_per_window

    def window_plan(self, epoch: int, window: int, shard: Shard, blocks: np.ndarray | None = None) -> WindowPlan:
        """What `shard` reads in `window` of `epoch`. `blocks` is ``self.blocks(epoch)`` where the caller has it."""
        if not 0 <= shard.rank < shard.size <= self.lanes:
            raise UsageError(f"worker {shard.rank} of {shard.size} with {self.lanes} lanes; lanes must not be fewer")
        blocks = self.blocks(epoch) if blocks is None else blocks
        tail_at = int(np.argmax(blocks == self._n_blocks - 1))
        first = window * self.steps_per_window
        last = min(first + self.steps_per_window, self.steps)
        bounds = self.bounds(first, last)
        lanes = tuple(range(shard.rank, self.lanes, shard.size))
        # how many cells of each lane come before each bound
        places = (bounds[:, None] - np.array(lanes) + self.lanes - 1) // self.lanes
        runs: list[tuple[int, int]] = []
        for k, lane in enumerate(lanes):
            start = self._lane_start(lane)
            for run in self._runs(blocks, tail_at, start + int(places[0, k]), start + int(places[-1, k])):
                if runs and runs[-1][1] == run[0]:
                    runs[-1] = (runs[-1][0], run[1])
                else:
                    runs.append(run)
        counts = np.diff(places, axis=0)
        states = np.array([_state(self.seed, _WINDOW, epoch, lane, window) for lane in lanes])
        order = _deal(counts, states, self.shuffle)
        return WindowPlan(first, tuple(runs), order, counts, lanes)


def _state(*words: int) -> np.uint64:
    return np.uint64(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@njit(nogil=True, cache=True)
def permutation(n: int, state: np.uint64) -> np.ndarray:
    """A uniform permutation of 0 .. n - 1 (Fisher and Yates), int64, a function of (n, state) alone."""
    out = np.arange(n)
    for i in range(n - 1, 0, -1):
        state = np.uint64(state + np.uint64(0x9E3779B97F4A7C15))
        z = state
        z = np.uint64((z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
        z = np.uint64((z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
        z = z ^ (z >> np.uint64(31))
        j = np.int64(((z >> np.uint64(32)) * np.uint64(i + 1)) >> np.uint64(32))  # bias below n / 2^32
        out[i], out[j] = out[j], out[i]
    return out


@njit(nogil=True, cache=True)
def _deal(counts: np.ndarray, states: np.ndarray, shuffle: bool) -> np.ndarray:
    """Places in the order of reading (lane behind lane), dealt to the steps; each lane's are shuffled before."""
    n_steps, n_lanes = counts.shape
    out = np.empty(counts.sum(), np.int64)
    starts = np.zeros((n_steps, n_lanes), np.int64)
    position = 0
    for s in range(n_steps):
        for k in range(n_lanes):
            starts[s, k] = position
            position += counts[s, k]
    before = 0
    for k in range(n_lanes):
        size = counts[:, k].sum()
        places = permutation(size, states[k]) if shuffle else np.arange(size)
        at = 0
        for s in range(n_steps):
            for c in range(counts[s, k]):
                out[starts[s, k] + c] = before + places[at]
                at += 1
        before += size
    return out
