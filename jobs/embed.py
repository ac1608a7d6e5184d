"""Streams cells through a trained model and writes where they lie in its latent space: ``latent.zarr``.

Memory is that of one batch and of the codes of obs, however many cells there are.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scarcade.dataloaders.loader import Columns, LoaderConfig, in_memory, stream
from scarcade.dataloaders.schema import Query, read_query
from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.contracts import Batch, Categories, Loader, Schema
from scarcade.engine.errors import CategoryError, GenesError, NonFiniteError
from scarcade.engine.folder import MANIFEST, read_manifest
from scarcade.engine.world import use_threads
from scarcade.jobs.latent import LatentWriter
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read

Progress = Callable[[int, int], None]
"""Told (cells done, cells in all) now and then."""

Column = tuple[Categories, np.ndarray]


def embed(
    model: str | Path | AtlasModel,
    data: Any,
    out: str | Path,
    *,
    batch_key: str | None = None,
    layer: str | None = None,
    batch_size: int = 1024,
    threads: int | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the latent mean and variance of every cell of `data` to the folder `out` (see `jobs.latent`).

    Args:
        model: a model, or its folder.
        data: a store (streamed), or an .h5ad, .zarr or AnnData (in memory).
        batch_key: column of obs with the batch of a file's cells. Batches that the model does not know are an error
            if its encoder sees the batch: such cells have to be mapped.

    Raises:
        GenesError: a store with other genes, or a file with too few. CategoryError: a batch that is not known.
        NonFiniteError: a cell whose latent is not finite.
    """
    if threads is not None:
        use_threads(threads)
    trained = model if isinstance(model, AtlasModel) else read(model)
    about = {"model": trained.fingerprint, "model_name": trained.name, "time": int(time.time())}
    config = LoaderConfig(batch_size=batch_size, validation=0.0)
    if is_store(data):
        store = open_store(data)
        loader: Loader = stream(store, "all", config, seed=0, lanes=1, shuffle=False)
        write_latent(
            trained,
            loader,
            Path(out),
            columns=columns_of(store),
            about={**about, "data": store.fingerprint},
            names=store.names,
            replace=replace,
            progress=progress,
        )
        return Path(out)
    query = read_query(data, trained.schema, batch_key=batch_key, layer=layer)
    values = Categories(query.batch_key, tuple(sorted(set(query.batch))))
    codes = np.array([values.codes()[value] for value in query.batch], np.int32)
    schema = _with_batches(trained.schema, values)
    columns: list[Column] = [(values, codes), *zip(trained.schema.labels, query.labels, strict=True)]
    write_latent(
        trained,
        in_memory(
            query.counts, batch_columns(query, codes, trained.schema), schema, config, seed=0, lanes=1, shuffle=False
        ),
        Path(out),
        columns=_distinct(columns),
        about={**about, "data": query.where},
        names=lambda start, stop: query.obs.index[start:stop].astype(str).tolist(),
        replace=replace,
        progress=progress,
    )
    return Path(out)


def write_latent(
    model: AtlasModel,
    loader: Loader,
    path: Path,
    *,
    columns: Sequence[Column] = (),
    about: dict[str, Any] | None = None,
    names: Callable[[int, int], Any] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the latent of every cell of `loader` to the folder `path`.

    Args:
        loader: gives the cells in their order (``lanes=1, shuffle=False``), each once; its batch codes are those of
            its own schema, and are translated into the model's by name.
        columns: what obs is to hold: categories and the codes of all cells.
        names: names of the cells [start, stop); without, they are numbered.

    Raises:
        CategoryError: a batch that the model does not know (and its encoder would see). NonFiniteError: as `embed`.
    """
    translate = batch_translation(loader.schema, model)
    model.eval()
    categories = [column for column, _ in columns]
    with LatentWriter(path, obsm_key=model.obsm_key, columns=categories, about=about or {}, replace=replace) as writer:
        done = 0
        for batch in loader.epoch(0):
            n = len(batch)
            if batch.rows[0] != done or batch.rows[-1] != done + n - 1:
                raise ValueError(f"cells {batch.rows[0]} to {batch.rows[-1]} where {done} was next: not in their order")
            mean, variance = latent_of(model, batch, translate)
            codes = [values[done : done + n] for _, values in columns]
            writer.append(mean, variance, codes, names(done, done + n) if names is not None else None)
            done += n
            if progress is not None:
                progress(done, loader.n_cells)


@torch.no_grad()
def latent_of(model: AtlasModel, batch: Batch, translate: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the latent of a batch, float32 (B, L) each.

    Raises:
        NonFiniteError: a cell's is not finite.
    """
    if translate is not None:
        batch = replace(batch, batch=torch.from_numpy(translate[batch.batch.numpy()]))
    mean, variance = (tensor.cpu().numpy() for tensor in model.embed(batch.to(model.device)))
    broken = ~(np.isfinite(mean).all(axis=1) & np.isfinite(variance).all(axis=1))
    if broken.any():
        shown = ", ".join(str(row) for row in batch.rows[broken][:10])
        raise NonFiniteError(f"the latent of {broken.sum()} cells is not finite (rows {shown}); check their counts")
    return mean, variance


def batch_translation(schema: Schema, model: AtlasModel) -> np.ndarray | None:
    """The model's code for each batch code of `schema`; None where they are the same.

    A model whose encoder does not see the batch takes any: the code has no effect on the latent.

    Raises:
        GenesError: other genes than the model's. CategoryError: batches that the model does not know.
    """
    if schema.genes != model.schema.genes:
        known = len(set(schema.genes) & set(model.schema.genes))
        raise GenesError(
            f"the data hold {schema.n_genes} genes, the model wants its {model.schema.n_genes} in their order "
            f"({known} are in both); ingest the files with --genes FILE, the model's genes one a line, or give the "
            "files themselves"
        )
    known_codes = model.schema.batch.codes()
    codes = np.array([known_codes.get(value, -1) for value in schema.batch.values], np.int64)
    if (codes < 0).any():
        if model.encodes_batch:
            unknown = [value for value, code in zip(schema.batch.values, codes, strict=True) if code < 0]
            shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise CategoryError(
                f"the model does not know the batch {shown}, and its encoder needs to; `scarcade map` learns new "
                "batches, --batch-key names the column of those that it knows"
            )
        codes[codes < 0] = 0
    return None if np.array_equal(codes, np.arange(len(codes))) else codes


def columns_of(store: Store) -> list[Column]:
    """Batch and label columns of a store, each once, for `write_latent`."""
    return _distinct([(column, store.codes(column.name)) for column in (store.schema.batch, *store.schema.labels)])


def batch_columns(query: Query, codes: np.ndarray, reference: Schema) -> Columns:
    """The columns of a query for `in_memory`, with the `codes` (n,) of its batches.

    Raises:
        CategoryError: a categorical covariate has a value that the reference does not know.
    """
    categorical = []
    for known, values in zip(reference.categorical, query.categorical, strict=True):
        table = known.codes()
        unknown = sorted({str(value) for value in values if value not in table})
        if unknown:
            raise CategoryError(
                f"{query.where}: {known.name!r} has values that are not known: {', '.join(unknown[:5])}"
            )
        categorical.append(np.array([table[value] for value in values], np.int64))
    return Columns(
        batch=codes,
        labels=query.labels[0] if query.labels else None,
        categorical=tuple(categorical),
        continuous=tuple(query.continuous.T),
        size_factor=query.size_factor,
        proteins=query.proteins,
        proteins_measured=query.proteins_measured,
    )


def is_store(data: Any) -> bool:
    """Whether `data` is the path of a store of ours."""
    if not isinstance(data, str | Path) or not (Path(data) / MANIFEST).is_file():
        return False
    return bool(read_manifest(Path(data)).get("kind") == "store")


def _with_batches(schema: Schema, batch: Categories) -> Schema:
    return replace(schema, batch=batch)


def _distinct(columns: Sequence[Column]) -> list[Column]:
    """Each name once: a label column may be the batch column too."""
    return list({column.name: (column, codes) for column, codes in columns}.values())
