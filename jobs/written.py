"""The result of one query on disk: all that was in the query, and what was found, as .h5ad or .zarr.

The query's own file is copied and added to, so what anndata would not bring through a round trip survives too; only
where a query and its result are of different formats is it read and written. A result is under its name only when it is
whole.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from scarcade.dataloaders.schema import Query
from scarcade.engine.errors import ScarcadeError, StorageError
from scarcade.engine.folder import MANIFEST, committed, read_manifest, sync
from scarcade.engine.quiet import quiet
from scarcade.jobs.one_query import Mapped
from scarcade.jobs.queries import Task
from scarcade.jobs.storable import storable
from scarcade.jobs.zarr_copy import zarr_to_h5ad

Format = Literal["h5ad", "zarr"]
DISTANCE = "reference_distance"
KIND = "result"  # in the manifest of a .zarr


def is_whole(path: Path) -> bool:
    """Whether a result that was written as a whole is there."""
    if path.suffix != ".zarr":
        return path.is_file()
    try:
        return bool(read_manifest(path).get("kind") == KIND)
    except ScarcadeError:
        return False


def write_result(path: Path, task: Task, query: Query, mapped: Mapped, provenance: Mapping[str, Any]) -> None:
    """Write the result of `task` to `path`, by its ending; what was there is replaced once it is complete.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    elements = found(query, mapped, provenance)
    source = Path(task.source) if isinstance(task.source, str | Path) else None
    try:
        (_write_zarr if path.suffix == ".zarr" else _write_h5ad)(path, source, task.source, elements)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error


def remove(path: Path) -> None:
    """Take a result away, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def found(query: Query, mapped: Mapped, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What is added to a query: elements of an AnnData by their place."""
    obs = annotated(query, mapped)
    key = mapped.model.obsm_key
    elements = {"obs": obs, f"obsm/{key}": mapped.mean, f"obsm/{key}_variance": mapped.variance}
    if mapped.classified is not None:
        one = mapped.classified
        table = pd.DataFrame(one.probabilities, index=obs.index, columns=list(one.column.values))
        elements[f"obsm/{one.column.name}_{one.by}"] = table
    elements["uns/scarcade"] = {"mapping": json.dumps(dict(provenance), sort_keys=True)}
    return elements


def annotated(query: Query, mapped: Mapped) -> pd.DataFrame:
    """The query's obs with ``<label>_pred`` and ``<label>_uncertainty`` of every label, and ``reference_distance``.

    Where the model has a classifier, what it says of the primary label is in ``<label>_<model>``.
    """
    obs = storable(query.obs)
    for prediction in mapped.predictions:
        values = pd.Categorical.from_codes(prediction.codes, categories=pd.Index(prediction.column.values))
        obs[f"{prediction.column.name}_pred"] = values
        obs[f"{prediction.column.name}_uncertainty"] = prediction.uncertainty
    if mapped.classified is not None:
        one = mapped.classified
        values = pd.Categorical.from_codes(one.codes, categories=pd.Index(one.column.values))
        obs[f"{one.column.name}_{one.by}"] = values
    if mapped.distance is not None:
        obs[DISTANCE] = mapped.distance
    return obs


def _write_h5ad(path: Path, source: Path | None, given: Any, elements: Mapping[str, Any]) -> None:
    import h5py

    temporary = path.with_name(f".tmp-{path.stem}-{os.getpid()}.h5ad")
    try:
        if source is None:
            _without_obs(given).write_h5ad(temporary)
        elif source.is_file():
            shutil.copyfile(source, temporary)
        else:
            zarr_to_h5ad(source, temporary)
        with h5py.File(temporary, "r+") as file:
            _put(file, elements)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _write_zarr(path: Path, source: Path | None, given: Any, elements: Mapping[str, Any]) -> None:
    import anndata as ad
    import zarr

    with committed(path, extra={"kind": KIND}, replace=True) as work, _version_3():
        if source is not None and source.is_dir():
            shutil.copytree(source, work, dirs_exist_ok=True, copy_function=shutil.copyfile)
            (work / MANIFEST).unlink(missing_ok=True)
        else:
            (ad.read_h5ad(source) if source is not None else _without_obs(given)).write_zarr(work)
        root = zarr.open_group(work, mode="r+", use_consolidated=False)
        _put(root, elements)
        zarr.consolidate_metadata(root.store)  # what the copy says of itself is old


def _without_obs(given: Any) -> Any:
    """A user's object without what is replaced in its result: writing it would change, or trip over, columns of obs."""
    import anndata as ad

    raw = given.raw
    with quiet():  # names that are not unique were so in the query
        return ad.AnnData(
            X=given.X,
            obs=pd.DataFrame(index=given.obs_names),
            var=given.var.copy(),
            uns=dict(given.uns),
            layers=dict(given.layers),
            raw=None if raw is None else {"X": raw.X, "var": raw.var, "varm": dict(raw.varm)},
            **{name: dict(getattr(given, name)) for name in ("obsm", "varm", "obsp", "varp")},
        )


def _put(root: Any, elements: Mapping[str, Any]) -> None:
    """Write elements in place of those that are there, in an open file or folder."""
    import anndata as ad

    for place, value in elements.items():
        group, _, name = place.rpartition("/")
        if group and group not in root:
            ad.io.write_elem(root, group, {})
        ad.io.write_elem(root[group] if group else root, name, value)


@contextmanager
def _version_3() -> Iterator[None]:
    """zarr as this library writes it elsewhere; without the advice that anndata and zarr have for those who write."""
    import anndata as ad

    with quiet(), ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):  # both are of the process
        yield
