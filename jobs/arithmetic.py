"""Arithmetic in the latent space of scGen: the response to a perturbation as a shift between means.

Lotfollahi et al. 2019 (Nat Methods 16). Cells are streamed: a first pass sums the latent by group, a second shifts
and decodes cells batch by batch. Latents are posterior means, so a result is a function of model and cells
(scArches draws them), and a mean that is balanced over labels is the mean of the labels' means, which is what
resampling every label to the size of the largest has as its expectation.

Shapes: n cells, G genes, L latent dimensions.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from scarcade.engine.errors import CategoryError, UsageError
from scarcade.jobs.asked import without_batch
from scarcade.jobs.cells import Cells, cells_of
from scarcade.jobs.table import TableWriter
from scarcade.jobs.trained import BATCH_SIZE, Trained
from scarcade.models.scgen import Scgen


@dataclass(frozen=True)
class LatentSums:
    """Number of cells and sum of their latents for each pair of groups; additive."""

    rows: tuple[str, ...]  # values of the first column: labels
    columns: tuple[str, ...]  # of the second: conditions or batches
    n: np.ndarray  # (rows, columns)
    total: np.ndarray  # float64 (rows, columns, L)

    def mean(self) -> np.ndarray:
        """(rows, columns, L); 0 where there are no cells."""
        means: np.ndarray = self.total / np.maximum(self.n, 1)[:, :, None]
        return means


def latent_sums(model: Scgen, cells: Cells, first: np.ndarray, second: np.ndarray, batch_size: int) -> LatentSums:
    """The sums over the cells that have a value in both of two columns of text (n,)."""
    row_values, column_values = values_of(first), values_of(second)
    rows = pd.Categorical(first, categories=row_values).codes
    columns = pd.Categorical(second, categories=column_values).codes
    n = np.zeros((len(row_values), len(column_values)), np.int64)
    total = np.zeros((*n.shape, model.n_latent))
    for where, mean in latents_of(model, cells, batch_size):
        r, c = rows[where], columns[where]
        known = (r >= 0) & (c >= 0)
        np.add.at(n, (r[known], c[known]), 1)
        np.add.at(total, (r[known], c[known]), mean[known])
    return LatentSums(tuple(row_values), tuple(column_values), n, total)


def response(
    trained: Trained,
    data: Any,
    *,
    condition_key: str,
    control: str,
    stimulated: str,
    label_key: str | None = None,
    labels: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
) -> np.ndarray:
    """The shift from control to stimulated cells, float32 (L,): the mean of the shifts of the labels.

    A label that only one of the two conditions has takes no part: the place of its cells in the latent would else be
    taken for a part of the response (scArches does that to every label that is held out to be predicted).

    Args:
        label_key: obs column with the labels; None: all cells are one.
        labels: only cells of these labels.

    Raises:
        UsageError: not a scgen model. CategoryError: a column, value or cells that are not there, or no label has
        cells of both conditions.
    """
    model, cells = scgen_of(trained), cells_of(data, trained.model)
    condition = cells.column(condition_key)
    label = np.full(cells.n_cells, "all", object) if label_key is None else cells.column(label_key)
    if labels is not None:
        if label_key is None:
            raise UsageError("labels: give label_key, the column they are in")
        label = np.where(np.isin(label, list(labels)), label, np.array(None, object))
    sums = latent_sums(model, cells, label, condition, batch_size)
    places = []
    for value in (control, stimulated):
        if value not in sums.columns or not sums.n[:, sums.columns.index(value)].any():
            raise CategoryError(f"{cells.where}: no cell has {value!r} in '{condition_key}' (and one of the labels)")
        places.append(sums.columns.index(value))
    both = (sums.n[:, places] > 0).all(1)
    if not both.any():
        raise CategoryError(
            f"{cells.where}: no label of '{label_key}' has cells of both {control!r} and {stimulated!r}; without "
            "label_key all cells are compared"
        )
    mean = sums.mean()[both]
    return np.asarray((mean[:, places[1]] - mean[:, places[0]]).mean(0), np.float32)


def predict_response(
    trained: Trained,
    data: Any,
    *,
    condition_key: str,
    control: str,
    stimulated: str,
    target: Any = None,
    target_label: str | None = None,
    label_key: str | None = None,
    labels: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
    out: str | Path | None = None,
    replace: bool = False,
) -> tuple[Any, np.ndarray]:
    """How cells would look after stimulation: (normalised log expression (m, G), the shift (L,)).

    Args:
        target: the cells to stimulate, or `target_label`: the control cells of that label in `data`.
        label_key, labels: as `response`.
        out: a folder for the expression, as X of a zarr AnnData written batch by batch; its path is returned then.

    Raises:
        UsageError: both or none of `target` and `target_label`, or not a scgen model. CategoryError: as `response`.
    """
    if (target is None) == (target_label is None):
        raise UsageError("give the cells to stimulate: either target, or target_label")
    shift_L = response(
        trained,
        data,
        condition_key=condition_key,
        control=control,
        stimulated=stimulated,
        label_key=label_key,
        labels=labels,
        batch_size=batch_size,
    )
    cells = cells_of(data if target is None else target, trained.model)
    if target_label is not None:
        if label_key is None:
            raise UsageError("target_label: give label_key, the column it is in")
        chosen = (cells.column(label_key) == target_label) & (cells.column(condition_key) == control)
        if not chosen.any():
            raise CategoryError(f"{cells.where}: no cell has {target_label!r} in '{label_key}' and {control!r}")
    else:
        chosen = np.ones(cells.n_cells, bool)
    model = scgen_of(trained)
    shift = torch.as_tensor(shift_L, device=model.device)

    def predicted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(names, expression) of the chosen cells."""
        for where, mean in latents_of(model, cells, batch_size, among=chosen):
            here = chosen[where]
            with torch.no_grad():
                x_BG = model.decode(torch.as_tensor(mean[here], device=model.device) + shift)
            yield cells.some_names(where.start, where.stop)[here], x_BG.cpu().numpy()

    if out is None:
        names, parts = (np.concatenate(part) for part in zip(*predicted(), strict=True))
        return pd.DataFrame(parts, index=names, columns=list(model.schema.genes)), shift_L
    uns = {"scarcade_response": json.dumps({"model": model.fingerprint, "control": control, "stimulated": stimulated})}
    writer = TableWriter(
        Path(out), arrays=["X"], columns=[], genes=model.schema.genes, uns=uns, extra={"kind": "table"}, replace=replace
    )
    with writer:
        for names, x in predicted():
            writer.append({"X": x}, [], map(str, names))
    return Path(out), shift_L


@torch.no_grad()
def latents_of(
    model: Scgen, cells: Cells, batch_size: int, *, among: np.ndarray | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """(places, latent means) of the cells, in their order, whatever their batches are.

    Batches of cells that have none `among`, bool (n,), are left out.
    """
    start = 0
    for batch in cells.batches(batch_size):
        where = slice(start, start + len(batch))
        start = where.stop
        if among is None or among[where].any():
            yield where, model.embed(without_batch(batch).to(model.device))[0].cpu().numpy()


def values_of(column: np.ndarray) -> list[str]:
    """The values of a column of text, sorted."""
    return sorted({str(value) for value in column if value is not None})


def scgen_of(trained: Trained) -> Scgen:
    """The model.

    Raises:
        UsageError: it is another one.
    """
    if not isinstance(trained.model, Scgen):
        raise UsageError(f"latent arithmetic is for scgen models, and this is a {trained.model.name} model")
    return trained.model
