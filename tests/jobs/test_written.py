"""Results as .h5ad and as .zarr, of queries in either: what was in a query is in its result."""

import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scarcade.jobs.inspect import inspect
from scarcade.jobs.mapping import map_queries
from tests.dataloaders.files import written
from tests.jobs.conftest import Atlas

QUICK: dict[str, Any] = {"epochs": 2, "optim": {"lr": 0.01}}
READ = {"h5ad": ad.read_h5ad, "zarr": ad.read_zarr}


def rich(atlas: Atlas) -> ad.AnnData:
    """A query with something in every part of it."""
    cells = ad.read_h5ad(atlas.query)[:60].copy()
    cells.obs["note"] = np.array(["seen", None] * 30, dtype=object)
    cells.obs["grade"] = pd.Categorical(["low", "high"] * 30, categories=["low", "high"], ordered=True)
    cells.var["length"] = np.arange(cells.n_vars)
    cells.layers["scaled"] = cells.X.toarray() / 3
    cells.obsm["X_umap"] = np.random.default_rng(0).random((60, 2))
    cells.obsp["near"] = cells.X @ cells.X.T
    cells.varm["loadings"] = np.ones((cells.n_vars, 3))
    cells.uns["deep"] = {"colours": np.array(["red", "blue"]), "n": 3, "scarcade": "not ours"}
    cells.raw = cells.copy()
    return cells


@pytest.mark.long
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("after", ["h5ad", "zarr"])
@pytest.mark.parametrize("before", ["h5ad", "zarr", "memory"])
def test_what_was_in_a_query_is_in_its_result(
    before: str, after: str, version: int, atlas: Atlas, tmp_path: Path
) -> None:
    if version == 3 and before != "zarr":
        pytest.skip("only a .zarr has versions")
    cells = rich(atlas)
    query: Any = cells
    if before != "memory":
        query = written(cells, tmp_path / f"q.{before}", version=version)
        cells = READ[before](query)
    columns = list(cells.obs.columns)
    (record,) = map_queries(atlas.model, {"q": query}, tmp_path / "out", results=after, **QUICK).queries
    assert record["state"] == "done", record
    assert record["result"] == f"q.{after}"
    found = READ[after](tmp_path / "out" / f"q.{after}")
    assert np.isfinite(found.obsm["X_scVI"]).all()
    assert found.obs["label_pred"].notna().all()
    assert list(found.obs_names) == list(cells.obs_names)
    assert list(cells.obs.columns) == columns
    assert found.obs["note"].isna().sum() == 30
    assert found.obs["grade"].cat.ordered
    pd.testing.assert_frame_equal(found.var, cells.var, check_dtype=False)
    for one, other in (
        *((found.X, cells.X), (found.raw.X, cells.raw.X), (found.layers["scaled"], cells.layers["scaled"])),
        *((found.obsm["X_umap"], cells.obsm["X_umap"]), (found.obsp["near"], cells.obsp["near"])),
        (found.varm["loadings"], cells.varm["loadings"]),
    ):
        np.testing.assert_array_equal(*(m.toarray() if hasattr(m, "toarray") else m for m in (one, other)))
    assert list(found.uns["deep"]["colours"]) == ["red", "blue"]
    assert found.uns["deep"]["scarcade"] == "not ours"
    assert json.loads(found.uns["scarcade"]["mapping"])["model"] == "scvi"
    looked = inspect(tmp_path / "out" / f"q.{after}")
    assert (looked["kind"], looked["intact"], looked["mapped"]["model"]) == (after, True, "scvi")


def test_a_result_in_the_other_format_takes_the_place_of_the_first(atlas: Atlas, tmp_path: Path) -> None:
    first = map_queries(atlas.model, atlas.query, tmp_path, **QUICK)
    wanted = ad.read_h5ad(tmp_path / "donor.h5ad").obsm["X_scVI"]
    second = map_queries(atlas.model, atlas.query, tmp_path, results="zarr", **QUICK)
    assert second.queries[0]["key"] == first.queries[0]["key"]
    assert not (tmp_path / "donor.h5ad").exists()
    np.testing.assert_array_equal(ad.read_zarr(tmp_path / "donor.zarr").obsm["X_scVI"], wanted)
    assert json.loads((tmp_path / "summary.json").read_text())["queries"][0]["result"] == "donor.zarr"
    stamp = (tmp_path / "donor.zarr").stat().st_mtime_ns
    assert map_queries(atlas.model, atlas.query, tmp_path, results="zarr", **QUICK).queries == second.queries
    assert (tmp_path / "donor.zarr").stat().st_mtime_ns == stamp
    shutil.rmtree(tmp_path / "donor.zarr")
    map_queries(atlas.model, atlas.query, tmp_path, results="zarr", **QUICK).raise_if_failed()
    assert (tmp_path / "donor.zarr").is_dir()


def test_a_result_can_be_mapped_again_and_a_flipped_byte_in_it_is_seen(atlas: Atlas, tmp_path: Path) -> None:
    map_queries(atlas.model, atlas.query, tmp_path / "a", results="zarr", **QUICK).raise_if_failed()
    map_queries(atlas.model, tmp_path / "a" / "donor.zarr", tmp_path / "b", results="zarr", **QUICK).raise_if_failed()
    one, other = (ad.read_zarr(tmp_path / name / "donor.zarr").obsm["X_scVI"] for name in "ab")
    np.testing.assert_array_equal(one, other)
    inside = (tmp_path / "b" / "donor.zarr" / "obsm" / "X_scVI" / "c").rglob("*")
    chunk = next(path for path in inside if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[::-1])
    looked = inspect(tmp_path / "b" / "donor.zarr")
    assert not looked["intact"]


def test_a_query_whose_name_looks_like_what_a_kill_leaves(atlas: Atlas, tmp_path: Path) -> None:
    from scarcade.engine.folder import sweep

    left = tmp_path / ".tmp-a-old-b.delta-12345678"
    left.mkdir()
    (left / "delta.json").write_text("half")
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())
