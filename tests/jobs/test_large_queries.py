"""Queries that are streamed come out as those that are held in memory, bit for bit, and leave nothing behind."""

import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scarcade.dataloaders.synthetic import simulate
from scarcade.jobs.mapping import MapResult, map_queries
from tests.dataloaders.files import written
from tests.jobs.conftest import Atlas

QUICK: dict[str, Any] = {"epochs": 2, "optim": {"lr": 0.01}}


def mapped(atlas: Atlas, query: Any, out: Path, *, above: int | None, **settings: Any) -> MapResult:
    data = {"validation": 0.1, **({} if above is None else {"stream_above": above})}
    return map_queries(atlas.model, query, out, batch_key="batch", data=data, **QUICK, **settings)


def same_results(one: Path, other: Path, name: str) -> ad.AnnData:
    a, b = (ad.read_h5ad(out / f"{name}.h5ad") for out in (one, other))
    for key in a.obsm:
        np.testing.assert_array_equal(np.asarray(a.obsm[key]), np.asarray(b.obsm[key]))
    pd.testing.assert_frame_equal(a.obs, b.obs)
    assert (a.X != b.X).nnz == 0
    weights = [(out / f"{name}.delta" / "delta.safetensors").read_bytes() for out in (one, other)]
    assert weights[0] == weights[1]
    return a


@pytest.mark.parametrize("form", [".h5ad", ".zarr", "csc.zarr", "memory"])
def test_streaming_changes_no_bit(atlas: Atlas, tmp_path: Path, form: str) -> None:
    cells = ad.read_h5ad(atlas.query)
    if form.startswith("csc"):
        cells.X = cells.X.tocsc()
    query: Any = {"donor": cells}
    if form == ".h5ad":
        query = atlas.query
    elif form != "memory":
        query = tmp_path / "donor.zarr"
        written(cells, query)
    for above in (None, 0):
        (record,) = mapped(atlas, query, tmp_path / str(above), above=above).queries
        assert record["state"] == "done", record["reason"]
    found = same_results(tmp_path / "None", tmp_path / "0", "donor")
    assert list(found.obs_names) == list(cells.obs_names)
    assert (found.X != ad.read_h5ad(atlas.query).X).nnz == 0
    assert not list((tmp_path / "0").glob(".tmp*"))


def test_what_was_held_is_done_when_it_would_be_streamed(atlas: Atlas, tmp_path: Path) -> None:
    mapped(atlas, atlas.query, tmp_path, above=None)
    before = (tmp_path / "donor.h5ad").stat().st_mtime_ns
    assert mapped(atlas, atlas.query, tmp_path, above=0).queries[0]["state"] == "done"
    assert (tmp_path / "donor.h5ad").stat().st_mtime_ns == before


def test_a_store_of_ours_is_mapped_where_it_lies(atlas: Atlas, tmp_path: Path) -> None:
    store = simulate(tmp_path / "q.zarr", cells=400, genes=150, batches=2, labels=4, seed=9)
    files = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    for above in (None, 0):
        (record,) = mapped(atlas, store.path, tmp_path / str(above), above=above).queries
        assert record["state"] == "done", record["reason"]
    found = same_results(tmp_path / "None", tmp_path / "0", "q")
    assert list(found.obs_names) == list(store.names(0, 400))
    assert files == {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}


def test_nothing_is_left_of_a_streamed_query_that_fails(atlas: Atlas, tmp_path: Path) -> None:
    data = {"stream_above": 0}
    result = map_queries(atlas.model, atlas.query, tmp_path, epochs=2, optim={"lr": 1e40}, data=data)
    assert result.queries[0]["state"] == "failed", result.queries[0]
    assert not list(tmp_path.glob(".tmp*"))


def test_what_a_killed_mapping_left_is_swept(atlas: Atlas, tmp_path: Path) -> None:
    shutil.copytree(atlas.store.path, tmp_path / ".tmp-scratch-0123")
    mapped(atlas, atlas.query, tmp_path, above=0)
    assert not list(tmp_path.glob(".tmp*"))
