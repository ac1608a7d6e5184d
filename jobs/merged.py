"""The reference and its mapped queries as one AnnData: their latents side by side, for a picture or a classifier.

What is written is a zarr group without counts (a reference does not carry those of its cells): obsm has the latent and
its variance, obs the batch, the labels (a reference's own, a query's predicted), how sure they are, how far a cell lies
from the reference, and which query it came from. Both are read in runs of cells, so memory does not grow with them.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scarcade.dataloaders.reading import piece
from scarcade.dataloaders.schema import FILE_COLUMN, code_of, text_of
from scarcade.dataloaders.source import AnnDataFile
from scarcade.engine.errors import CorruptError, InputError, StorageError, UsageError
from scarcade.engine.folder import read_manifest
from scarcade.engine.schema import Categories, Schema
from scarcade.jobs.latent import LATENT, VARIANCE, LatentReader, latent_arrays
from scarcade.jobs.reference import Reference
from scarcade.jobs.results import Record, Results
from scarcade.jobs.table import TableWriter
from scarcade.jobs.written import DISTANCE

KIND = "merged"
REFERENCE = "reference"  # what the cells of the reference came from
_RUN = 1 << 16  # cells that are held at once


@dataclass(frozen=True)
class _Result:
    """What a done query left, as far as it is merged."""

    name: str
    path: Path
    batch_key: str
    batches: tuple[str, ...]


def check_merge(path: Path, reference: Reference, names: Sequence[str], out: Path) -> None:
    """Refuse what cannot be merged, before anything is mapped.

    Raises:
        UsageError: the reference has no latent, a query has its name, something else is at `path`, or it would take the
            place of the results in `out`. StorageError: nothing can be written there.
    """
    place, results = path.resolve(), out.resolve()
    if place == results or place in results.parents or place in {results / f"{name}.zarr" for name in names}:
        raise UsageError(f"--merge {path}: results of --out {out} are to lie there; choose another name")
    if reference.latent is None:
        raise UsageError(
            f"--merge: {reference.path} has no {LATENT}, so where its cells lie is not known; give a model that "
            "`scarcade train` made, or leave --merge out"
        )
    if REFERENCE in names:
        raise UsageError(
            f"--merge: a query is called {REFERENCE!r}, as the cells of the reference are; name it otherwise"
        )
    if path.suffix != ".zarr":
        raise UsageError(f"--merge {path}: is written as a folder of zarr; its name has to end with .zarr")
    if path.exists() and _kind(path) != KIND:
        raise UsageError(f"--merge {path}: is there already and was not written by --merge; it is not replaced")
    there = next(one for one in place.parents if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"--merge {path}: cannot be written, because {there} is no folder that takes new files")


def write_merged(path: Path, reference: Reference, results: Results, records: Sequence[Record]) -> Path:
    """Write the cells of `reference` and of the queries that are done to `path`; an older one is replaced.

    Raises:
        StorageError: `path` cannot be written. CorruptError: a latent or a result is not what was written.
    """
    latent = LatentReader(reference.path / LATENT)
    done = [_result(results, record) for record in records if record["state"] == "done"]
    schema = reference.schema
    batch = schema.batch.extended([name for one in done for name in one.batches])
    origin = Categories(_free("query", schema), (REFERENCE, *(one.name for one in done)))
    numbers = [*(f"{column.name}_uncertainty" for column in schema.labels), DISTANCE]
    key = reference.model.obsm_key
    about = {"reference": reference.fingerprint, "model": reference.model.name, "queries": [one.name for one in done]}
    writer = TableWriter(
        path,
        arrays=tuple(latent_arrays(key, *np.empty((2, 0, 0)))),
        columns=[batch, *schema.labels, origin],
        numbers=numbers,
        uns={"scarcade_merged": json.dumps(about)},
        extra={"kind": KIND, "format": 1, "about": about},
        replace=True,
    )
    with writer:
        for mean, variance, codes in _of_reference(latent, [batch, *schema.labels]):
            n = len(mean)
            names = (f"{REFERENCE}/{i}" for i in range(writer.n_cells, writer.n_cells + n))
            unknown = [np.full(n, np.nan, np.float32) for _ in numbers]
            writer.append(latent_arrays(key, mean, variance), [*codes, np.zeros(n, np.int64)], names, unknown)
        for place, one in enumerate(done, start=1):
            _append(writer, one, place, batch, schema, key, latent.n_latent)
    return path


def _of_reference(
    latent: LatentReader, columns: Sequence[Categories]
) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """Mean, variance and the codes of `columns` of the reference's cells, in runs."""
    there = [column.name for column in latent.columns]
    for column in columns:
        if column.name not in there:
            raise CorruptError(f"{latent.path}: has no column {column.name!r}; it is not the latent of this reference")
        old = latent.columns[there.index(column.name)].values
        if column.values[: len(old)] != old:
            raise CorruptError(f"{latent.path}: the values of {column.name!r} are not those of the reference")
    for start in range(0, latent.n_cells, _RUN):
        mean, variance, codes = latent.rows(start, min(start + _RUN, latent.n_cells))
        yield mean, variance, [codes[there.index(column.name)] for column in columns]


def _append(
    writer: TableWriter, one: _Result, place: int, batch: Categories, schema: Schema, key: str, n_latent: int
) -> None:
    """The cells of one query; terms that its surgery added to the latent are left out."""
    with AnnDataFile(one.path) as file:
        obs = file.obs()
        codes = [code_of(_batch(obs, one), batch)]
        codes += [code_of(text_of(_column(obs, f"{c.name}_pred", one)), c) for c in schema.labels]
        sure = [_column(obs, f"{c.name}_uncertainty", one).to_numpy(np.float32) for c in schema.labels]
        numbers = [*sure, _column(obs, DISTANCE, one).to_numpy(np.float32)]
        if not obs.index.is_unique:
            import anndata

            obs.index = anndata.utils.make_index_unique(pd.Index(obs.index))
        arrays = [file.root[f"obsm/{name}"] for name in (key, f"{key}{VARIANCE}")]
        for start in range(0, len(obs), _RUN):
            run = slice(start, min(start + _RUN, len(obs)))
            mean, variance = (piece(a, run.start, run.stop, str(one.path))[:, :n_latent] for a in arrays)
            writer.append(
                latent_arrays(key, mean, variance),
                [*(values[run] for values in codes), np.full(len(mean), place)],
                [f"{one.name}/{cell}" for cell in obs.index[run]],
                [values[run] for values in numbers],
            )


def _result(results: Results, record: Mapping[str, Any]) -> _Result:
    name, path = str(record["name"]), results.result(str(record["name"]))
    with AnnDataFile(path) as file:
        try:
            mapping = json.loads(str(file.element("uns/scarcade")["mapping"]))
            return _Result(name, path, str(mapping["batch_key"]), tuple(map(str, mapping["batches"])))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{path}: does not say how it was mapped ({error!r}); map it again") from error


def _batch(obs: pd.DataFrame, one: _Result) -> np.ndarray:
    if one.batch_key == FILE_COLUMN and len(one.batches) == 1:
        return np.full(len(obs), one.batches[0], object)
    return text_of(_column(obs, one.batch_key, one))


def _column(obs: pd.DataFrame, name: str, one: _Result) -> pd.Series:
    """A column of a result; all missing where there was nothing to transfer (no cell of the reference has a label)."""
    if name in obs.columns:
        return obs[name]
    if len(obs) and name in (one.batch_key, DISTANCE):
        raise CorruptError(f"{one.path}: has no obs column {name!r}; map it again")
    return pd.Series(np.full(len(obs), np.nan), index=obs.index)


def _free(name: str, schema: Schema) -> str:
    """`name`, or a longer one where the reference has a column of this name."""
    taken = {schema.batch.name, *(column.name for column in schema.labels)}
    return f"scarcade_{name}" if name in taken else name


def _kind(path: Path) -> Any:
    try:
        return read_manifest(path).get("kind")
    except InputError:
        return None
