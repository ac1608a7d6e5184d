"""Steps of a training on a GPU, recorded once and replayed: CUDA graphs.

A step is some hundred and fifty kernels, most of which a GPU has done before its host has asked for the next one: in
batches of 128 cells it works for a tenth of the time. So the steps of a training are asked for one by one a few times,
then once more to be recorded, and from then on by a single call. The kernels and their order are the same, and so are
the numbers, to the bit.

What changes from step to step is put into memory that stays where it is: the counts, the small tensors of the cells,
the keys of the step's noise, its KL weight and its learning rate. Batches of another shape (the last of an epoch) have
a record of their own, or are computed as before.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.contracts import TENSORS, Batch, Losses, Noise, Step
from scarcade.engine.gpu import compiles_for
from scarcade.engine.metrics import Sums
from scarcade.engine.streams import GpuStreams

BEFORE = 3  # steps of a shape that are asked for one by one: kernels are compiled, libraries loaded, moments made
MOST = 4  # records that are kept: each has the memory of a step

Compute = Callable[[Batch, Step, Noise, Tensor], tuple[Losses, Tensor]]
"""All that a GPU does in a step: batch, where, noise, learning rate -> (losses, a number that is finite if all are)."""


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


class _Fixed:
    """Cells and their noise in memory that stays where it is."""

    def __init__(self, batch: Batch, noise: Noise) -> None:
        lanes = _streams(noise).lanes
        self.lanes = lanes.clone()
        self.columns = {name: value.clone() for name in TENSORS if (value := getattr(batch, name)) is not None}
        self.dense_BG = batch.counts.dense(lanes.device).clone()
        columns: dict[str, Any] = dict(self.columns)
        self.batch = replace(batch, counts=FixedCounts(self.dense_BG), labelled=None, **columns)
        self.noise = Noise.of_streams(_streams(noise).with_lanes(self.lanes), len(batch), lanes.device)

    def fill(self, batch: Batch, noise: Noise) -> None:
        """Put others there."""
        self.dense_BG.copy_(batch.counts.dense(self.dense_BG.device))
        given = [*(getattr(batch, name) for name in self.columns), _streams(noise).lanes]
        torch._foreach_copy_([*self.columns.values(), self.lanes], given)


class _Record:
    """A step of one shape."""

    def __init__(self, compute: Compute, batch: Batch, noise: Noise, where: Step) -> None:
        self._all = _Fixed(batch, noise)
        fixed, self._labelled = self._all.batch, None
        if batch.labelled is not None and noise.labelled is not None:
            self._labelled = _Fixed(batch.labelled, noise.labelled)
            fixed = replace(fixed, labelled=self._labelled.batch)
            self._all.noise.labelled = self._labelled.noise
        self._scalars = torch.zeros(2, device=batch.batch.device)  # KL weight, learning rate
        kl_weight, lr = self._scalars.unbind()
        self._graph = torch.cuda.CUDAGraph()
        # the thread that reads ahead goes on with its copies
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            losses, self._number = compute(fixed, replace(where, kl_weight=kl_weight), self._all.noise, lr)
            terms = {"loss": losses.minimise, **losses.terms}
            beside = {} if losses.labelled is None else {"loss": losses.labelled, **losses.labelled_terms}
            parts = [term.detach().sum(dtype=torch.float64) for term in (*terms.values(), *beside.values())]
            self._sums = torch.stack(parts)
        self._names, self._names_beside = list(terms), list(beside)
        self._totals = torch.zeros_like(self._sums)
        self._steps = 0

    def replay(self, batch: Batch, noise: Noise, where: Step) -> Tensor:
        """Take the step for another batch; a number that is finite if its losses and gradients are."""
        self._all.fill(batch, noise)
        if self._labelled is not None:
            assert batch.labelled is not None
            assert noise.labelled is not None
            self._labelled.fill(batch.labelled, noise.labelled)
        scalars = torch.tensor((float(where.kl_weight), where.lr), pin_memory=True)
        self._scalars.copy_(scalars, non_blocking=True)
        self._graph.replay()
        self._totals += self._sums
        self._steps += 1
        return self._number

    def hand_over(self, sums: Sums) -> None:
        """Add what its steps have summed up since it was last asked."""
        if not self._steps:
            return
        n = len(self._names)
        sums.add_sums(self._names, self._totals[:n], self._steps * len(self._all.batch))
        if self._labelled is not None:
            sums.add_labelled_sums(self._names_beside, self._totals[n:], self._steps * len(self._labelled.batch))
        self._totals = torch.zeros_like(self._totals)
        self._steps = 0


def _streams(noise: Noise) -> GpuStreams:
    assert isinstance(noise.streams, GpuStreams)
    return noise.streams


class Recorder:
    """Takes the steps of a training, recorded or not.

    Args:
        compute: the step; must ask the host for nothing.
        told: is given the reason, once, if a step cannot be recorded; then all are asked for one by one.
    """

    def __init__(self, compute: Compute, told: Callable[[str], None]) -> None:
        self._compute, self._told = compute, told
        self._seen: dict[Any, int] = {}
        self._records: dict[Any, _Record] = {}
        self._off = False

    def step(self, batch: Batch, where: Step, noise: Noise) -> Tensor | None:
        """Take a step by a record, made if it is time to; None: there is none, and nothing was done."""
        shape = _shape(batch)
        record = self._records.get(shape)
        if record is None:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._off or self._seen[shape] <= BEFORE or len(self._records) == MOST:
                return None
            try:
                record = self._records[shape] = _Record(self._compute, batch, noise, where)
            except RuntimeError as error:
                self._off = True
                self._told(f"steps cannot be recorded, and are asked for one by one ({str(error).splitlines()[0]})")
                return None
        return record.replay(batch, noise, where)

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
