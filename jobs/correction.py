"""Batch removal with scGen, and mapping onto a corrected reference: batches of a label shifted onto one of them.

Lotfollahi et al. 2019. Two passes over the cells: the first sums latents by label and batch, the second shifts,
decodes and hands on, batch by batch: into an AnnData, or into a folder that holds more cells than memory.

Shapes: n cells, G genes, L latent dimensions.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from scarcade.dataloaders.array_reader import ArrayReader, StringReader
from scarcade.dataloaders.schema import text_of
from scarcade.dataloaders.stored_files import LocalFiles
from scarcade.engine.errors import CategoryError, UsageError
from scarcade.engine.folder import read_manifest
from scarcade.engine.schema import Categories
from scarcade.jobs.arithmetic import LatentSums, latent_sums, latents_of, scgen_of, values_of
from scarcade.jobs.cells import Cells, cells_of
from scarcade.jobs.table import TableWriter
from scarcade.jobs.trained import BATCH_SIZE, Trained
from scarcade.models.scgen import Scgen

Anchor = Literal["largest", "reference"]
CORRECTED, REFERENCE = "latent_corrected", "reference_map"
KIND = "corrected"
_OURS = "\0reference"
Progress = Callable[[int, int], None]


def remove_batches(
    trained: Trained,
    data: Any,
    *,
    batch_key: str,
    label_key: str,
    batch_size: int = BATCH_SIZE,
    out: str | Path | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Corrected expression: each label's batches are shifted onto its largest batch, and decoded.

    X is normalised log expression (n, G), obsm["latent_corrected"] the latent of that. Cells without a label and
    labels of one batch alone are decoded where they are.

    Args:
        out: a folder for the result, a zarr AnnData that is written batch by batch.

    Returns:
        An AnnData; with `out` its path.

    Raises:
        UsageError: not a scgen model. CategoryError: a column that is not there.
    """
    model, cells = scgen_of(trained), cells_of(data, trained.model)
    label, batch = cells.column(label_key), cells.column(batch_key)
    sums = latent_sums(model, cells, label, batch, batch_size)
    shift = _Shift(model, cells, label, batch, sums, shifts_of(sums), batch_size)
    return shift.handed_on({batch_key: batch, label_key: label}, out, replace, progress)


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
    out: str | Path | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The cells of `query` shifted, label by label, onto a corrected reference; nothing is trained.

    Args:
        corrected: what `remove_batches` made of the reference, or the folder that it wrote.
        label_key: obs column of the query (and of the reference, unless `reference_label_key` is given).
        anchor: "reference": its cells stay where they are. "largest": as in scArches, of each label the larger of
            reference and query batches; then the shifted reference is in the result too (in memory alone).
        out: a folder for the result, as of `remove_batches`.

    Returns:
        As `remove_batches`, with obs["reference_map"]: the batch, or "reference".

    Raises:
        UsageError: not a scgen model, or an anchor that wants the reference in memory. CategoryError: a column that
        is not there. GenesError: other genes.
    """
    import anndata as ad

    model, cells = scgen_of(trained), cells_of(query, trained.model)
    on_disk = isinstance(corrected, str | Path)
    if anchor == "largest" and (on_disk or out is not None):
        raise UsageError("anchor largest moves the reference too, in memory: give it as an AnnData, and no out")
    label, batch = cells.column(label_key), cells.column(batch_key)
    known = reference_label_key or label_key
    pieces = _of_folder(Path(corrected), known, model) if on_disk else _of_anndata(model, corrected, known, batch_size)
    sums = _with_reference(latent_sums(model, cells, label, batch, batch_size), pieces)
    shifts = shifts_of(sums, anchor=0 if anchor == "reference" else None)
    obs = {batch_key: batch, label_key: label, REFERENCE: batch}
    mapped = _Shift(model, cells, label, batch, sums, shifts, batch_size).handed_on(obs, out, replace, progress)
    if anchor == "reference":
        return mapped
    both = list(_of_anndata(model, corrected, known, batch_size))
    place = pd.Categorical(np.concatenate([text for text, _ in both]), categories=list(sums.rows)).codes
    moved = np.concatenate([z for _, z in both])
    moved = moved + np.where((place >= 0)[:, None], shifts[place, 0], 0.0).astype(np.float32)
    decoded = [_decoded(model, moved[i : i + batch_size]) for i in range(0, len(moved), batch_size)]
    x = np.concatenate([part for part, _ in decoded])
    first = ad.AnnData(x, obs=corrected.obs.assign(**{REFERENCE: "reference"}), var=corrected.var)
    first.obsm[CORRECTED] = np.concatenate([part for _, part in decoded])
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


@dataclass(frozen=True)
class _Shift:
    """The second pass: cells, and what is added to the latent of each."""

    model: Scgen
    cells: Cells
    label: np.ndarray
    batch: np.ndarray
    sums: LatentSums
    shifts: np.ndarray
    batch_size: int

    def pieces(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(places, expression, its latent) of the cells, in their order."""
        rows = pd.Categorical(self.label, categories=list(self.sums.rows)).codes
        columns = pd.Categorical(self.batch, categories=list(self.sums.columns)).codes
        for where, mean in latents_of(self.model, self.cells, self.batch_size):
            r, c = rows[where], columns[where]
            known = ((r >= 0) & (c >= 0))[:, None]
            yield where, *_decoded(self.model, mean + np.where(known, self.shifts[r, c], 0.0).astype(np.float32))

    def handed_on(
        self, obs: dict[str, np.ndarray], out: str | Path | None, replace: bool, progress: Progress | None
    ) -> Any:
        """An AnnData, or the folder `out`."""
        told = progress or (lambda done, of: None)
        n, genes = self.cells.n_cells, self.model.schema.genes
        if out is None:
            import anndata as ad

            x, latent = np.empty((n, len(genes)), np.float32), np.empty((n, self.model.n_latent), np.float32)
            for where, expression, z in self.pieces():
                x[where], latent[where] = expression, z
                told(where.stop, n)
            frame = pd.DataFrame(obs, index=pd.Index(self.cells.names().astype(str)))
            made = ad.AnnData(x, obs=frame, var=pd.DataFrame(index=pd.Index(genes)))
            made.obsm[CORRECTED] = latent
            return made
        columns = [Categories(name, tuple(values_of(values))) for name, values in obs.items()]
        codes = [pd.Categorical(obs[one.name], categories=list(one.values)).codes for one in columns]
        writer = TableWriter(
            Path(out),
            arrays=("X", f"obsm/{CORRECTED}"),
            columns=columns,
            genes=genes,
            uns={f"scarcade_{KIND}": json.dumps({"model": self.model.fingerprint, "data": self.cells.where})},
            extra={"kind": KIND, "model": self.model.fingerprint},
            replace=replace,
        )
        with writer:
            for where, expression, z in self.pieces():
                names = map(str, self.cells.some_names(where.start, where.stop))
                writer.append({"X": expression, f"obsm/{CORRECTED}": z}, [one[where] for one in codes], names)
                told(where.stop, n)
        return Path(out)


Pieces = Iterator[tuple[np.ndarray, np.ndarray]]
"""(labels as text, latents) of a corrected reference's cells, in runs."""


def _of_anndata(model: Scgen, corrected: Any, known: str, batch_size: int) -> Pieces:
    if list(corrected.var_names) != list(model.schema.genes) or known not in corrected.obs:
        raise CategoryError(f"the corrected reference is not one of this model with obs column {known!r}")
    text = text_of(corrected.obs[known])
    for start in range(0, corrected.n_obs, batch_size):
        part = corrected.X[start : start + batch_size]
        dense = np.asarray(part.toarray() if hasattr(part, "toarray") else part, np.float32)
        with torch.no_grad():
            z = model.encode(torch.as_tensor(dense, device=model.device))[0].cpu().numpy()
        yield text[start : start + batch_size], z


def _of_folder(folder: Path, known: str, model: Scgen) -> Pieces:
    manifest = read_manifest(folder)
    if manifest.get("kind") != KIND or known not in manifest.get("columns", ()):
        raise CategoryError(f"{folder}: is not a corrected reference with obs column {known!r}")
    if manifest.get("model") != model.fingerprint:
        raise CategoryError(f"{folder}: was corrected by the model {manifest.get('model')}, not by {model.fingerprint}")
    files = LocalFiles(folder)
    categories = StringReader(files, f"obs/{known}/categories", manifest)
    values = np.array([*categories.rows(0, len(categories)), None], dtype=object)
    codes = ArrayReader(files, f"obs/{known}/codes", manifest)
    latent = ArrayReader(files, f"obsm/{CORRECTED}", manifest)
    for start in range(0, len(latent), 1 << 16):
        stop = min(start + (1 << 16), len(latent))
        yield values[codes.rows(start, stop)], latent.rows(start, stop)


def _with_reference(sums: LatentSums, pieces: Pieces) -> LatentSums:
    """`sums` with the reference's cells as a first column."""
    n, total = dict.fromkeys(sums.rows, 0), dict.fromkeys(sums.rows, np.zeros(sums.total.shape[2]))
    for text, latent in pieces:
        values = values_of(text)
        codes = pd.Categorical(text, categories=values).codes
        for code, value in enumerate(values):
            here = codes == code
            n[value] = n.get(value, 0) + int(here.sum())
            total[value] = total.get(value, np.zeros(latent.shape[1])) + latent[here].sum(0, dtype=np.float64)
    rows = tuple(sorted(n))
    place = [rows.index(value) for value in sums.rows]
    all_n = np.zeros((len(rows), 1 + len(sums.columns)), np.int64)
    all_total = np.zeros((*all_n.shape, sums.total.shape[2]))
    all_n[place, 1:], all_total[place, 1:] = sums.n, sums.total
    all_n[:, 0], all_total[:, 0] = [n[value] for value in rows], np.stack([total[value] for value in rows])
    return LatentSums(rows, (_OURS, *sums.columns), all_n, all_total)


@torch.no_grad()
def _decoded(model: Scgen, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expression decoded from latents, and the latent that it is encoded to again."""
    x_BG = model.decode(torch.as_tensor(latent, device=model.device))
    return x_BG.cpu().numpy(), model.encode(x_BG)[0].cpu().numpy()
