"""What the floors agree on: Batch, Noise, Step, Losses; the Model and Loader protocols (and `engine.schema`).

A model knows no file, no rank and no Ray. A loader knows no model. Both know these types.

Randomness is an argument (`Noise`), drawn per lane of the plan from streams that are seeded by
(seed, step, lane). So a step needs no generator state to be resumed, and a cell meets the same noise
whatever the number of workers is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from scarcade.engine.schema import Position, Schema
from scarcade.engine.streams import Streams, streams_on

_LABELLED = 0x6C6162  # a seed word that keeps the noise of labelled cells apart from that of the cells beside


class Counts(Protocol):
    """Counts of B cells x G genes, held compressed until a device wants them."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def dense(self, device: torch.device) -> Tensor:
        """float32 (B, G). May be a reused buffer: valid until the loader's next batch but one."""
        ...

    def log1p(self, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
        """ln(1 + count), (B, G), as float32 or bfloat16; may be a reused buffer, as `dense`."""
        ...

    def csr(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indptr int64 (B+1,), gene index, value), to be read alone: they may be views, which keep a whole window."""
        ...


class PartedCounts(Counts, Protocol):
    """Counts as loaders give them, which can be computed in parts."""

    def part(self, start: int, stop: int) -> Counts:
        """Those of the cells [start, stop). Their dense form may take the place of that of another part."""
        ...

    def into(self, out_BG: Tensor) -> None:
        """Put what `dense` gives into memory on a GPU."""
        ...


TENSORS = ("batch", "labels", "categorical", "continuous", "proteins", "proteins_measured", "size_factor")


def alone(rows: Tensor) -> Tensor:
    """`Batch.together` of one worker: its cells are all there are."""
    return rows


@dataclass(frozen=True, slots=True)
class Batch:
    """One worker's part of a global batch of cells.

    Cells come grouped by lane: the first `lanes[0][1]` cells are those of lane `lanes[0][0]`, and so on.
    """

    counts: Counts
    batch: Tensor  # int64 (B,) code of the condition
    labels: Tensor  # int64 (B,) code of the primary label; UNLABELLED where there is none
    rows: np.ndarray  # int64 (B,) place of each cell in the store
    position: Position  # where the loader stands after this batch
    lanes: tuple[tuple[int, int], ...]  # (lane, number of its cells), in the order of the cells
    n_global: int  # cells of this global batch over all workers
    categorical: Tensor | None = None  # int64 (B, number of extra categorical covariates)
    continuous: Tensor | None = None  # float32 (B, number of extra continuous covariates)
    proteins: Tensor | None = None  # float32 (B, P)
    proteins_measured: Tensor | None = None  # bool (B, P); False: not measured (never a zero)
    size_factor: Tensor | None = None  # float32 (B,)
    labelled: "Batch | None" = None  # labelled cells that come beside these, for models that ask for them
    known: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # (B, ...) what a frozen model made of the cells before (its `constants`)
    queries: tuple[int, ...] | None = (
        None  # cells of each query, one behind the other, where several are trained at once
    )
    together: Callable[[Tensor], Tensor] = alone
    """Rows of these cells (B, ...) -> those of the cells of all workers (n_global, ...), with the gradient of our own.

    For statistics of a batch that are no sum over cells (`Losses.penalty`). All workers must call it alike.
    """

    def __len__(self) -> int:
        return len(self.rows)

    def each(self, rows: Tensor) -> tuple[Tensor, ...]:
        """`rows` (B, ...) of all workers' cells, cut into those of each query: for statistics that are of one alone."""
        whole = self.together(rows)
        return (whole,) if self.queries is None else torch.split(whole, list(self.queries))

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """A number of each query (of `each`) for each of its cells (B,), without a gradient."""
        if self.queries is None:
            return values[0].detach().expand(len(self))
        return torch.cat([value.detach().expand(n) for value, n in zip(values, self.queries, strict=True)])

    def to(self, device: torch.device) -> Self:
        """The same batch with its small tensors on `device`; counts stay packed until `dense`."""
        if self.batch.device == device and (self.labelled is None or self.labelled.batch.device == device):
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name in TENSORS if (value := getattr(self, name)) is not None
        }
        if self.labelled is not None:
            moved["labelled"] = self.labelled.to(device)
        if self.known:
            moved["known"] = {name: value.to(device, non_blocking=True) for name, value in self.known.items()}
        return replace(self, **moved)


Segments = Sequence[tuple[tuple[int, ...], int]]
"""(seed words, number of cells) of each lane."""


class Noise:
    """The randomness of one step, for the cells of one batch, drawn lane by lane.

    ``segments`` are (seed words, number of cells): equal seed words give equal numbers, so a cell's noise
    depends on (seed, step, lane) and its place in the lane, not on how lanes are dealt to workers.
    Draws are counted, so they must come in the same order on every worker. A GPU draws the same numbers as a CPU; one
    that Triton cannot compile for draws others.
    """

    labelled: "Noise | None" = None
    """That of `Batch.labelled`."""

    def __init__(self, segments: Segments, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        sizes = [n for _, n in segments]
        self._n_cells = sum(sizes)
        self.streams: Streams = streams_on(self.device)([words for words, _ in segments], sizes, self.device)

    @classmethod
    def of_step(cls, seed: int, step: int, batch: Batch, device: torch.device | None = None) -> "Noise":
        """The noise of optimiser step `step` of a run with `seed`."""
        noise, *beside = (cls(segments, device) for segments in segments_of(seed, step, batch))
        noise.labelled = beside[0] if beside else None
        return noise

    @classmethod
    def of_streams(cls, streams: Streams, n_cells: int, device: torch.device) -> "Noise":
        """The noise of `n_cells` cells that some streams give."""
        noise = object.__new__(cls)
        noise.device, noise._n_cells, noise.streams = device, n_cells, streams
        return noise

    @property
    def n_cells(self) -> int:
        return self._n_cells

    def normal(self, *features: int) -> Tensor:
        """Standard normal, float32 (B, *features)."""
        return self.streams.fill("normal", torch.empty(self.n_cells, *features, device=self.device))

    def uniform(self, *features: int) -> Tensor:
        """Uniform on [0, 1), float32 (B, *features)."""
        return self.streams.fill("uniform", torch.empty(self.n_cells, *features, device=self.device))

    def dropout(self, x_BH: Tensor, p: float) -> Tensor:
        """Inverted dropout of (B, H): each entry is kept with probability 1 - p and scaled by 1 / (1 - p)."""
        if p == 0.0:
            return x_BH
        keep_BH = self.uniform(*x_BH.shape[1:]).ge_(p)
        return x_BH * keep_BH.to(x_BH.dtype).div_(1.0 - p)


def segments_of(seed: int, step: int, batch: Batch) -> list[Segments]:
    """Of the noise of a step: those of its cells, and those of the labelled cells beside them."""
    found: list[Segments] = [[((seed, step, lane), n) for lane, n in batch.lanes]]
    if batch.labelled is not None:
        found.append([((seed, step, lane, _LABELLED), n) for lane, n in batch.labelled.lanes])
    return found


@dataclass(frozen=True, slots=True)
class Step:
    """Where training stands, as a model's loss may need it."""

    step: int = 0  # optimiser steps taken before this one
    epoch: int = 0
    cells: int = 0  # cells seen before this step, over all workers
    kl_weight: float | Tensor = 1.0
    """A tensor (B,): that of each cell, where queries of several ages are trained at once; on a GPU a scalar there."""
    lr: float = 1e-3  # learning rate of this step (proximal operators are scaled by it)


@dataclass(slots=True)
class Losses:
    """What a model returns for a batch.

    `minimise` holds what each cell contributes to the loss; the engine takes its mean over the GLOBAL
    batch. `penalty` is for what belongs to no cell (an MMD, a prior on weights): a scalar, added once, which
    every worker finds alike, from weights or from rows that it put `together` (`Batch`).
    `terms` are for people to read: named, per cell, summed over cells and divided by their number.
    `labelled` and `labelled_terms` are the same for the M cells of `Batch.labelled`; the engine takes their
    mean over the labelled cells of all workers.
    """

    minimise: Tensor  # (B,)
    terms: dict[str, Tensor] = field(default_factory=dict)  # each (B,)
    penalty: Tensor | None = None  # scalar
    labelled: Tensor | None = None  # (M,)
    labelled_terms: dict[str, Tensor] = field(default_factory=dict)  # each (M,)

    def detached(self) -> "Losses":
        """The same numbers, without what a backward pass needs."""
        return Losses(
            self.minimise.detach(),
            {name: term.detach() for name, term in self.terms.items()},
            None,
            None if self.labelled is None else self.labelled.detach(),
            {name: term.detach() for name, term in self.labelled_terms.items()},
        )


@runtime_checkable
class Model(Protocol):
    """What the engine and the jobs need of a model; every one is also a `torch.nn.Module`."""

    name: ClassVar[str]  # the name on the command line: "scvi"
    obsm_key: ClassVar[str]  # where its latent goes in AnnData: "X_scVI"
    schema: Schema

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        """The loss of each cell. With `noise=None` every latent is its mean and nothing is dropped."""
        ...

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent, each (B, n_latent)."""
        ...

    def after_step(self, step: Step) -> None:
        """Called after every update (proximal operators); most models do nothing."""
        ...


class Loader(Protocol):
    """Batches of one split of one store, for one worker."""

    schema: Schema

    @property
    def n_cells(self) -> int:
        """Cells of this split, over all workers."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """The same on every worker."""
        ...

    @property
    def waited(self) -> float:
        """Seconds that the consumer has waited for data so far."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on; every cell of the split once, over all workers."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the cells, their order or their values do."""
        ...
