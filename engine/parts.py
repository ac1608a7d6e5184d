"""A batch in parts that are computed one after the other, so that only one of them is held for the way back at a time.

Parts are whole lanes: each cell has the noise that it has in the whole batch (decision 001), and with the same share of
the loss the gradient is that of the whole batch. What is of a batch and no sum over its cells is of each part: the
statistics of batch norm, and penalties, whose mean is taken.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from scarcade.engine.contracts import TENSORS, Batch, PartedCounts
from scarcade.engine.errors import UsageError


def parts_of(batch: Batch, n: int) -> Sequence[Batch]:
    """`batch` in `n` parts with whole lanes of about as many cells; the labelled cells beside it are parted alike.

    Each part says of itself what the batch says of all (`n_global`, `position`).

    Raises:
        UsageError: the batch has fewer lanes.
    """
    if n == 1:
        return (batch,)
    if len(batch.lanes) < n:
        raise UsageError(
            f"--optim.accumulate {n}: batches are parted between lanes, of which a worker has {len(batch.lanes)} here; "
            f"set --data.lanes to {n} for each worker, or --optim.accumulate to {len(batch.lanes)} at most"
        )
    cuts = [len(batch.lanes) * i // n for i in range(n + 1)]
    beside = parts_of(batch.labelled, n) if batch.labelled is not None else (None,) * n
    ends = [sum(size for _, size in batch.lanes[:cut]) for cut in cuts]
    return [_some(batch, slice(ends[i], ends[i + 1]), batch.lanes[cuts[i] : cuts[i + 1]], beside[i]) for i in range(n)]


def _some(batch: Batch, cells: slice, lanes: tuple[tuple[int, int], ...], labelled: Batch | None) -> Batch:
    small: dict[str, Any] = {name: value[cells] for name in TENSORS if (value := getattr(batch, name)) is not None}
    return replace(
        batch,
        counts=cast(PartedCounts, batch.counts).part(cells.start, cells.stop),
        rows=batch.rows[cells],
        lanes=lanes,
        labelled=labelled,
        known={name: value[cells] for name, value in batch.known.items()},
        **small,
    )
