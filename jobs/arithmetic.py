"""Arithmetic in the latent space of scGen: responses to a perturbation, and batches, as shifts between means.

Lotfollahi et al. 2019 (Nat Methods 16). Cells are streamed: a first pass sums the latent by group, a second shifts
and decodes cells batch by batch. Latents are posterior means, so a result is a function of model and cells
(scArches draws them), and a mean that is balanced over labels is the mean of the labels' means, which is what
resampling every label to the size of the largest has as its expectation.

Shapes: n cells, G genes, L latent dimensions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from scarcade.dataloaders.schema import text_of
from scarcade.engine.contracts import Batch
from scarcade.engine.errors import CategoryError, UsageError
from scarcade.jobs.cells import Cells, cells_of
from scarcade.jobs.trained import BATCH_SIZE, Trained
from scarcade.models.scgen import Scgen

Anchor = Literal["largest", "reference"]
CORRECTED, REFERENCE = "latent_corrected", "reference_map"


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
    row_values, column_values = _values(first), _values(second)
    rows = pd.Categorical(first, categories=row_values).codes
    columns = pd.Categorical(second, categories=column_values).codes
    n = np.zeros((len(row_values), len(column_values)), np.int64)
    total = np.zeros((*n.shape, model.n_latent))
    for where, mean in _latents(model, cells, batch_size):
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
    model, cells = _scgen(trained), cells_of(data, trained.model)
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
) -> tuple[pd.DataFrame, np.ndarray]:
    """How cells would look after stimulation: (normalised log expression (m, G), the shift (L,)).

    Args:
        target: the cells to stimulate, or `target_label`: the control cells of that label in `data`.
        label_key, labels: as `response`.

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
        names, cells = cells.names()[chosen], cells.take(np.flatnonzero(chosen))
    else:
        names = cells.names()
    model = _scgen(trained)
    shift = torch.as_tensor(shift_L, device=model.device)
    parts = []
    with torch.no_grad():
        for batch in cells.batches(batch_size):
            parts.append(model.decode(model.embed(batch.to(model.device))[0] + shift).cpu().numpy())
    return pd.DataFrame(np.concatenate(parts), index=names, columns=list(model.schema.genes)), shift_L


def remove_batches(trained: Trained, data: Any, *, batch_key: str, label_key: str, batch_size: int = BATCH_SIZE) -> Any:
    """An AnnData of corrected expression: each label's batches are shifted onto its largest batch, and decoded.

    Its X is normalised log expression (n, G), its obsm["latent_corrected"] the latent of that. Cells without a label
    and labels of one batch alone are decoded where they are.

    Raises:
        UsageError: not a scgen model. CategoryError: a column that is not there.
    """
    model, cells = _scgen(trained), cells_of(data, trained.model)
    label, batch = cells.column(label_key), cells.column(batch_key)
    sums = latent_sums(model, cells, label, batch, batch_size)
    shifts = shifts_of(sums)
    return _corrected(model, cells, label, batch, sums, shifts, batch_size, {batch_key: batch, label_key: label})


def map_corrected(
    trained: Trained,
    corrected: Any,
    query: Any,
    *,
    batch_key: str,
    label_key: str,
    reference_label_key: str | None = None,
    anchor: Anchor = "reference",
    batch_size: int = BATCH_SIZE,
) -> Any:
    """The cells of `query` shifted, label by label, onto a corrected reference; nothing is trained.

    Args:
        corrected: what `remove_batches` made of the reference.
        label_key: obs column of the query (and of the reference, unless `reference_label_key` is given).
        anchor: "reference": its cells stay where they are. "largest": as in scArches, of each label the larger of
            reference and query batches; then the shifted reference is in the result too.

    Returns:
        AnnData as of `remove_batches`, with obs["reference_map"]: the batch, or "reference".

    Raises:
        UsageError: not a scgen model. CategoryError: a column that is not there. GenesError: other genes.
    """
    import anndata as ad

    model, cells = _scgen(trained), cells_of(query, trained.model)
    label, batch = cells.column(label_key), cells.column(batch_key)
    known = reference_label_key or label_key
    if list(corrected.var_names) != list(model.schema.genes) or known not in corrected.obs:
        raise CategoryError(f"the corrected reference is not one of this model with obs column {known!r}")
    theirs = text_of(corrected.obs[known])
    reference = np.concatenate(list(_encoded(model, corrected.X, batch_size)))
    sums = _with_reference(latent_sums(model, cells, label, batch, batch_size), theirs, reference)
    shifts = shifts_of(sums, anchor=0 if anchor == "reference" else None)
    obs = {batch_key: batch, label_key: label, REFERENCE: batch}
    mapped = _corrected(model, cells, label, batch, sums, shifts, batch_size, obs)
    if anchor == "reference":
        return mapped
    place = pd.Categorical(theirs, categories=list(sums.rows)).codes
    moved = reference + np.where((place >= 0)[:, None], shifts[place, 0], 0.0).astype(np.float32)
    x, latent = _decoded(model, moved, batch_size)
    first = ad.AnnData(x, obs=corrected.obs.assign(**{REFERENCE: "reference"}), var=corrected.var)
    first.obsm[CORRECTED] = latent
    return ad.concat([first, mapped], join="outer")


def shifts_of(sums: LatentSums, *, anchor: int | None = None) -> np.ndarray:
    """What to add to the latent of a cell of each (row, column), (rows, columns, L).

    Every column is moved onto the anchor of its row: the column with most cells (the first of equals), or the given
    one where it has cells.
    """
    mean = sums.mean()
    largest = sums.n.argmax(1)
    chosen = largest if anchor is None else np.where(sums.n[:, anchor] > 0, anchor, largest)
    shift: np.ndarray = mean[np.arange(len(sums.rows)), chosen][:, None] - mean
    shift[sums.n == 0] = 0.0
    return shift


def _with_reference(sums: LatentSums, labels: np.ndarray, latent: np.ndarray) -> LatentSums:
    """`sums` with the reference's cells as a first column."""
    rows = tuple(sorted({*sums.rows, *(value for value in labels if value is not None)}))
    place = [rows.index(value) for value in sums.rows]
    n = np.zeros((len(rows), 1 + len(sums.columns)), np.int64)
    total = np.zeros((*n.shape, latent.shape[1]))
    n[place, 1:], total[place, 1:] = sums.n, sums.total
    codes = pd.Categorical(labels, categories=list(rows)).codes
    np.add.at(n[:, 0], codes[codes >= 0], 1)
    np.add.at(total[:, 0], codes[codes >= 0], latent[codes >= 0])
    return LatentSums(rows, ("\0reference", *sums.columns), n, total)


def _corrected(
    model: Scgen,
    cells: Cells,
    label: np.ndarray,
    batch: np.ndarray,
    sums: LatentSums,
    shifts: np.ndarray,
    batch_size: int,
    obs: dict[str, np.ndarray],
) -> Any:
    import anndata as ad

    rows = pd.Categorical(label, categories=list(sums.rows)).codes
    columns = pd.Categorical(batch, categories=list(sums.columns)).codes
    x = np.empty((cells.n_cells, model.schema.n_genes), np.float32)
    latent = np.empty((cells.n_cells, model.n_latent), np.float32)
    for where, mean in _latents(model, cells, batch_size):
        r, c = rows[where], columns[where]
        moved = mean + np.where(((r >= 0) & (c >= 0))[:, None], shifts[r, c], 0.0).astype(np.float32)
        x[where], latent[where] = _decoded(model, moved, batch_size)
    frame = pd.DataFrame(obs, index=pd.Index(cells.names().astype(str)))
    out = ad.AnnData(x, obs=frame, var=pd.DataFrame(index=pd.Index(model.schema.genes)))
    out.obsm[CORRECTED] = latent
    return out


@torch.no_grad()
def _latents(model: Scgen, cells: Cells, batch_size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(places, latent means) of the cells, in their order."""
    start = 0
    for batch in cells.batches(batch_size):
        one: Batch = replace(batch, batch=torch.zeros_like(batch.batch)).to(model.device)
        yield slice(start, start + len(batch)), model.embed(one)[0].cpu().numpy()
        start += len(batch)


@torch.no_grad()
def _encoded(model: Scgen, x: Any, batch_size: int) -> Iterator[np.ndarray]:
    """Latent means of normalised log expression."""
    for start in range(0, x.shape[0], batch_size):
        part = x[start : start + batch_size]
        dense = np.asarray(part.toarray() if hasattr(part, "toarray") else part, np.float32)
        yield model.encode(torch.as_tensor(dense, device=model.device))[0].cpu().numpy()


@torch.no_grad()
def _decoded(model: Scgen, latent: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Expression decoded from latents, and the latent that it is encoded to again."""
    parts = []
    for start in range(0, len(latent), batch_size):
        x_BG = model.decode(torch.as_tensor(latent[start : start + batch_size], device=model.device))
        parts.append((x_BG.cpu().numpy(), model.encode(x_BG)[0].cpu().numpy()))
    return np.concatenate([x for x, _ in parts]), np.concatenate([z for _, z in parts])


def _values(column: np.ndarray) -> list[str]:
    return sorted({str(value) for value in column if value is not None})


def _scgen(trained: Trained) -> Scgen:
    if not isinstance(trained.model, Scgen):
        raise UsageError(f"latent arithmetic is for scgen models, and this is a {trained.model.name} model")
    return trained.model
