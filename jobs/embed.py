"""Streams cells through a trained model and writes where they lie in its latent space, and whatever else is asked.

Memory is that of one batch and of the codes of obs, however many cells a store has; the counts of a file are held in
memory. What is written is ``latent.zarr`` (see `jobs.latent`), with further outputs as layers and entries of obsm.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scarcade.dataloaders.store import is_store
from scarcade.engine.contracts import Batch, Loader
from scarcade.engine.errors import CategoryError, NonFiniteError, UsageError
from scarcade.engine.published import published
from scarcade.engine.schema import Categories
from scarcade.engine.storage import is_url
from scarcade.engine.world import use_threads
from scarcade.jobs.asked import Asked, asked_of, matters, noises_of, without_batch
from scarcade.jobs.cached_model import local_model
from scarcade.jobs.cells import StoreCells, cells_of, checked_batch_size
from scarcade.jobs.fetched import near
from scarcade.jobs.latent import LatentReader, latent_arrays, latent_writer
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read

OUTPUTS = "scarcade_outputs"  # entry of uns with the names of the columns
Progress = Callable[[int, int], None]
"""Told (cells done, cells in all) now and then."""

Column = tuple[Categories, np.ndarray]


def embed(
    model: str | Path | AtlasModel,
    data: Any,
    out: str | Path,
    *,
    outputs: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    n_samples: int = 0,
    batch_key: str | None = None,
    layer: str | None = None,
    batch_size: int = 1024,
    threads: int | None = None,
    seed: int = 0,
    replace: bool = False,
    progress: Progress | None = None,
) -> Path | str:
    """Write the latent mean and variance of every cell of `data` to the folder `out` (see `jobs.latent`).

    Args:
        model: a model, or its folder or URL.
        data: a store (streamed), or an .h5ad, .zarr or AnnData (its counts in memory); or a URL of one of them.
        out: a folder, or a URL: then it is written on this disk first.
        outputs: what else to write, of the model's `offered`: genes come to ``layers/<model>_<output>``, the rest to
            ``obsm/<model>_<output>``; labels to obs besides.
        settings: of the outputs; each is given to those that take it (``{"transform_batch": "donor1"}``).
        n_samples: draws of the latent that outputs are averaged over; 0 takes the latent's mean.
        batch_key: column of obs with the batch of a file's cells. Batches that the model does not know are an error
            if its encoder sees the batch: such cells have to be mapped.

    Raises:
        GenesError: too few of the model's genes. CategoryError: a batch that is not known.
        UsageError: an output or setting that the model does not have, draws without outputs, or a number that is too
            small.
        NonFiniteError: a cell whose latent is not finite.
    """
    checked_batch_size(batch_size)
    if n_samples < 0:
        raise UsageError(f"--samples {n_samples}: wanted are 0 (the latent's mean) or more draws")
    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads {threads}: wanted are 1 or more")
        use_threads(threads)
    trained = model if isinstance(model, AtlasModel) else read(local_model(model))
    asked = asked_of(trained, outputs, settings or {})
    if n_samples and not asked:
        raise UsageError(f"--samples {n_samples}: outputs are averaged over them, and none is asked for (--output)")
    far = isinstance(data, str) and is_url(data) and not is_store(data)
    with near(data) if far else nullcontext(data) as here, published(out, replace=replace) as target:
        cells = cells_of(here, trained, batch_key=batch_key, layer=layer)
        seen = matters(cells, trained, asked)
        write_latent(
            trained,
            cells.loader(batch_size),
            target,
            columns=cells.described(),
            about={
                "model": trained.fingerprint,
                "model_name": trained.name,
                "time": int(time.time()),
                "data": cells.view.store.fingerprint if isinstance(cells, StoreCells) else cells.where,
            },
            names=cells.some_names,
            asked=asked,
            sees_batch=seen,
            n_samples=n_samples,
            seed=seed,
            replace=replace,
            progress=progress,
        )
    return str(out) if is_url(out) else Path(out)


def write_latent(
    model: AtlasModel,
    loader: Loader | None,
    path: Path,
    *,
    columns: Sequence[Column] = (),
    about: dict[str, Any] | None = None,
    names: Callable[[int, int], Any] | None = None,
    before: LatentReader | None = None,
    asked: Sequence[Asked] = (),
    sees_batch: bool = True,
    n_samples: int = 0,
    seed: int = 0,
    replace: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the latent of every cell of `loader` to the folder `path`.

    Args:
        loader: gives the cells in their order (``lanes=1, shuffle=False``), each once, with codes of the model; None
            for those of `before` alone.
        columns: what obs is to hold: categories and the codes of all cells.
        names: names of the cells [start, stop); without, they are numbered.
        before: cells with a latent of this model already, which come first; its columns must begin like `columns`.
        asked: what else to write (not with `before`).
        sees_batch: whether codes of batches count; if not, any may come.

    Raises:
        CategoryError: `before` has other columns. NonFiniteError: as `embed`.
    """
    model.eval()
    predicted = [one.categories for one in asked if one.categories is not None]
    writer = latent_writer(
        path,
        obsm_key=model.obsm_key,
        columns=[*(column for column, _ in columns), *predicted],
        about=about or {},
        tables=[one.place for one in asked],
        uns={OUTPUTS: {one.name: json.dumps(list(one.columns)) for one in asked}} if asked else {},
        genes=model.schema.genes if any(one.output.genes for one in asked) else (),
        replace=replace,
    )
    with writer:
        if before is not None:
            _copy(before, writer.append, [column for column, _ in columns], model.obsm_key)
        done = 0
        for batch in loader.epoch(0) if loader is not None else ():
            n = len(batch)
            if batch.rows[0] != done or batch.rows[-1] != done + n - 1:
                raise ValueError(f"cells {batch.rows[0]} to {batch.rows[-1]} where {done} was next: not in their order")
            if not sees_batch:
                batch = without_batch(batch)
            arrays = latent_arrays(model.obsm_key, *latent_of(model, batch))
            codes = [values[done : done + n] for _, values in columns]
            for one in asked:
                values = one.values(model, batch.to(model.device), noises_of(batch, model, seed, n_samples))
                arrays[one.place] = values
                if one.categories is not None:
                    codes.append(values.argmax(axis=1))
            writer.append(arrays, codes, names(done, done + n) if names is not None else None)
            done += n
            if progress is not None and loader is not None:
                progress(done, loader.n_cells)


def _copy(before: LatentReader, append: Callable[..., None], columns: Sequence[Categories], obsm_key: str) -> None:
    """The cells of `before`, in runs."""
    there = {column.name: place for place, column in enumerate(before.columns)}
    for column in columns:
        if column.name not in there:
            raise CategoryError(f"{before.path}: has no column '{column.name}'; it is not the latent of this reference")
        old = before.columns[there[column.name]]
        if column.values[: len(old)] != old.values:
            raise CategoryError(f"{before.path}: the values of '{column.name}' are not those of the reference")
    for start in range(0, before.n_cells, 1 << 16):
        mean, variance, codes = before.rows(start, min(start + (1 << 16), before.n_cells))
        append(latent_arrays(obsm_key, mean, variance), [codes[there[column.name]] for column in columns])


@torch.no_grad()
def latent_of(model: AtlasModel, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the latent of a batch, float32 (B, L) each.

    Raises:
        NonFiniteError: a cell's is not finite.
    """
    mean, variance = (tensor.cpu().numpy() for tensor in model.embed(batch.to(model.device)))
    broken = ~(np.isfinite(mean).all(axis=1) & np.isfinite(variance).all(axis=1))
    if broken.any():
        shown = ", ".join(str(row) for row in batch.rows[broken][:10])
        raise NonFiniteError(f"the latent of {broken.sum()} cells is not finite (rows {shown}); check their counts")
    return mean, variance
