"""Steps of a training on a GPU, recorded once and replayed: CUDA graphs.

A step is some hundred and fifty kernels, most of which a GPU has done before its host has asked for the next one. So
the steps of a training are asked for one by one a few times, then once more to be recorded, and from then on by a
single call. The kernels and their order are the same, and so are
the numbers, to the bit.

What changes from step to step is put into memory that stays where it is: the counts, the small tensors of the cells,
the keys of the step's noise, its KL weight and its learning rate. Batches of another shape (the last of an epoch) have
a record of their own, or are computed as before.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.contracts import TENSORS, Batch, Losses, Noise, PartedCounts, Segments, Step, segments_of
from scarcade.engine.errors import UsageError
from scarcade.engine.gpu import compiles_for
from scarcade.engine.metrics import Sums
from scarcade.engine.streams import GpuStreams, words_of

BEFORE = 3  # steps of a shape that are asked for one by one: kernels are compiled, libraries loaded, moments made
MOST = 4  # records that are kept: each has the memory of a step
_SLOTS = 4  # steps whose words may be on their way; the host is two steps ahead of the GPU at most (`readback`)

Compute = Callable[[Batch, Step, Noise, Tensor], tuple[Losses, Tensor]]
"""All that a GPU does in a step: batch, where, noise, learning rate -> (losses, a number that is finite if all are)."""
Asked = tuple[float, float]


class FixedCounts:
    """Counts (B, G) in memory that stays where it is (`scarcade.engine.contracts.Counts`)."""

    def __init__(self, dense_BG: Tensor) -> None:
        self.dense_BG = dense_BG

    @property
    def shape(self) -> tuple[int, int]:
        return self.dense_BG.shape[0], self.dense_BG.shape[1]

    def dense(self, device: torch.device) -> Tensor:
        return self.dense_BG

    def log1p(self, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
        return self.dense_BG.log1p().to(kind)

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        raise TypeError("counts of a recorded step are on a GPU")


class _Words:
    """int64 numbers on the GPU that each step brings anew, in one copy that nobody waits for."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.there = torch.zeros(n, dtype=torch.int64, device=device)
        self._slots = [torch.empty(n, dtype=torch.int64, pin_memory=True) for _ in range(_SLOTS)]
        self._views = [slot.numpy() for slot in self._slots]
        self._turn = 0

    def bring(self, words: Sequence[np.ndarray]) -> None:
        """Put these there, behind what the GPU was asked for so far."""
        np.concatenate(words, out=self._views[self._turn])
        self.there.copy_(self._slots[self._turn], non_blocking=True)
        self._turn = (self._turn + 1) % _SLOTS


class _Fixed:
    """Cells in memory that stays where it is, with noise by the keys that stand in `lanes`."""

    def __init__(self, batch: Batch, segments: Segments, lanes: Tensor) -> None:
        self._columns = {name: value.clone() for name in TENSORS if (value := getattr(batch, name)) is not None}
        self._dense_BG = batch.counts.dense(lanes.device).clone()
        columns: dict[str, Any] = dict(self._columns)
        self.batch = replace(batch, counts=FixedCounts(self._dense_BG), labelled=None, **columns)
        self.noise = Noise.of_streams(GpuStreams.of_lanes(lanes, len(segments)), len(batch), lanes.device)

    def fill(self, batch: Batch) -> None:
        """Put others there."""
        cast(PartedCounts, batch.counts).into(self._dense_BG)
        torch._foreach_copy_(list(self._columns.values()), [getattr(batch, name) for name in self._columns])


class _Record:
    """A step of one shape."""

    def __init__(self, compute: Compute, batch: Batch, where: Step, all_segments: Sequence[Segments]) -> None:
        device = batch.batch.device
        parts = [batch] if batch.labelled is None else [batch, batch.labelled]
        # each begins at a multiple of 16 bytes, as memory of its own does: else another kernel would be compiled for it
        sizes = [-(-(3 * len(segments) + 1) // 2) * 2 for segments in all_segments]
        self._words = _Words(sum(sizes) + 4, device)
        *lanes, scalars = torch.split(self._words.there, [*sizes, 4])
        self._parts = [_Fixed(*one) for one in zip(parts, all_segments, lanes, strict=True)]
        fixed, noise = self._parts[0].batch, self._parts[0].noise
        if len(parts) == 2:
            fixed, noise.labelled = replace(fixed, labelled=self._parts[1].batch), self._parts[1].noise
        self._graph = torch.cuda.CUDAGraph()
        # the thread that reads ahead goes on with its copies
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            kl_weight, lr, save, stop = scalars.view(torch.float64).float().unbind()
            # what else a step might want to know of where it stands is not in the record: a nan is seen, a 4 is not
            no: Any = math.nan
            losses, number = compute(fixed, Step(no, no, no, kl_weight, no), noise, lr)
            self._numbers = torch.stack([number, save, stop])
            terms = {"loss": losses.minimise, **losses.terms}
            beside = {} if losses.labelled is None else {"loss": losses.labelled, **losses.labelled_terms}
            found = [term.detach().sum(dtype=torch.float64) for term in (*terms.values(), *beside.values())]
            self._sums = torch.stack(found)
        self._names = list(terms), list(beside)
        self._totals = torch.zeros_like(self._sums)
        self._steps = 0

    def replay(self, batch: Batch, where: Step, all_segments: Sequence[Segments], asked: Asked) -> Tensor:
        """Take the step for another batch.

        Returns:
            Three numbers, valid until the next step: one that is finite if losses and gradients are; what was `asked`.
        """
        for fixed, one in zip(self._parts, [batch, *([batch.labelled] if batch.labelled else [])], strict=True):
            fixed.fill(one)
        lanes = [words_of([seed for seed, _ in one], [n for _, n in one]) for one in all_segments]
        scalars = np.array([where.kl_weight, where.lr, *asked], np.float64).view(np.int64)
        self._words.bring([*(np.pad(one, (0, len(one) % 2)) for one in lanes), scalars])
        self._graph.replay()
        self._totals += self._sums
        self._steps += 1
        return self._numbers

    def hand_over(self, sums: Sums) -> None:
        """Add what its steps have summed up since it was last asked."""
        if not self._steps:
            return
        names, beside = self._names
        sums.add_sums(names, self._totals[: len(names)], self._steps * len(self._parts[0].batch))
        if beside:
            cells = self._steps * len(self._parts[1].batch)
            sums.add_labelled_sums(beside, self._totals[len(names) :], cells)
        self._totals = torch.zeros_like(self._totals)
        self._steps = 0


class Recorder:
    """Takes the steps of a training by records, made when it is time to; `compute` must ask the host for nothing."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._seen: dict[Any, int] = {}
        self._records: dict[Any, _Record] = {}

    def step(self, batch: Batch, where: Step, seed: int, asked: Asked) -> Tensor | None:
        """Take a step by a record (as `replay`), made if it is time to; None: there is none, and nothing was done.

        Raises:
            UsageError: it cannot be recorded. torch is then still on the stream of the record, so nothing can go on.
        """
        shape, all_segments = _shape(batch), segments_of(seed, where.step, batch)
        record = self._records.get(shape)
        if record is None:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= BEFORE or len(self._records) == MOST:
                return None
            try:
                record = self._records[shape] = _Record(self._compute, batch, where, all_segments)
            except RuntimeError as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise UsageError(
                    f"steps of this model cannot be recorded on {torch.cuda.get_device_name()} ({reason}); set "
                    "--optim.record false (slower), or a smaller --data.batch-size if memory was short"
                ) from error
        return record.replay(batch, where, all_segments, asked)

    def hand_over(self, sums: Sums) -> None:
        """Add what all records have summed up."""
        for record in self._records.values():
            record.hand_over(sums)


def _shape(batch: Batch) -> Any:
    """What must be the same of two batches that one record is for."""
    columns = [(name, value.shape, value.dtype) for name in TENSORS if (value := getattr(batch, name)) is not None]
    beside = None if batch.labelled is None else (_shape(batch.labelled), batch.labelled.n_global)
    return batch.counts.shape, len(batch.lanes), batch.n_global, tuple(columns), beside


def can_be_recorded(model: Any, device: torch.device, n_workers: int, accumulate: int) -> bool:
    """Whether the steps of a training are the same work, whatever the values: and of one worker, in one part."""
    return compiles_for(device) and n_workers == 1 and accumulate == 1 and bool(getattr(model, "recordable", False))
