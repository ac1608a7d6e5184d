"""Reference and queries as one AnnData."""

import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scarcade.engine.errors import UsageError
from scarcade.jobs.latent import read_latent
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.merged import REFERENCE
from scarcade.jobs.score import score
from tests.jobs.conftest import Atlas

QUICK: dict[str, Any] = {"epochs": 2, "optim": {"lr": 0.01}}


@pytest.mark.parametrize("results", ["h5ad", "zarr"])
def test_reference_and_queries_stand_side_by_side(results: str, atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)
    queries = {
        "one": cells,
        "two": cells[:30].copy(),
        "none": cells[:0].copy(),
        "bad": ad.AnnData(np.ones((3, 2), np.float32)),
    }
    for query in list(queries.values())[:3]:
        del query.obs["label"]
    merged = tmp_path / "all.zarr"
    result = map_queries(
        atlas.model, queries, tmp_path / "out", batch_key="batch", merge=merged, results=results, **QUICK
    )
    assert result.merged == merged
    found, latent = ad.read_zarr(merged), read_latent(atlas.model / "latent.zarr")
    n = len(latent)
    assert found.n_obs == n + cells.n_obs + 30
    assert found.obs_names.is_unique
    assert found.X is None
    counted = found.obs["query"].value_counts()
    assert dict(counted) == {REFERENCE: n, "one": cells.n_obs, "two": 30, "none": 0}
    np.testing.assert_array_equal(found.obsm["X_scVI"][:n], latent.mean)
    np.testing.assert_array_equal(found.obsm["X_scVI_variance"][:n], latent.variance)
    assert score(merged, labels="label", batches="query")["n_cells"] > 0
    known, codes = latent.column("label") or (None, None)
    assert known is not None
    assert codes is not None
    assert list(found.obs["label"][:n]) == [known.values[code] for code in codes]
    assert set(found.obs["batch"][:n]) == set(atlas.store.schema.batch.values) - {atlas.new_batch}
    assert found.obs["reference_distance"][:n].isna().all()
    read = ad.read_h5ad if results == "h5ad" else ad.read_zarr
    for name in ("one", "two"):
        own, there = read(tmp_path / "out" / f"{name}.{results}"), found[found.obs["query"] == name]
        np.testing.assert_array_equal(there.obsm["X_scVI"], own.obsm["X_scVI"])
        assert list(there.obs["label"]) == list(own.obs["label_pred"])
        assert set(there.obs["batch"]) == {atlas.new_batch}
        assert list(there.obs_names) == [f"{name}/{cell}" for cell in own.obs_names]
        np.testing.assert_array_equal(there.obs["label_uncertainty"], own.obs["label_uncertainty"])
        np.testing.assert_array_equal(there.obs["reference_distance"], own.obs["reference_distance"])
    again = map_queries(
        atlas.model, {"one": cells}, tmp_path / "out", batch_key="batch", merge=merged, results=results, **QUICK
    )
    assert again.merged == merged
    assert ad.read_zarr(merged).n_obs == n + cells.n_obs


def test_a_query_of_one_batch_is_in_the_batch_named_after_it_and_names_may_repeat(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)[:20].copy()
    cells.obs_names = ["same"] * 20
    map_queries(atlas.model, {"q": cells}, tmp_path / "out", merge=tmp_path / "all.zarr", **QUICK).raise_if_failed()
    found = ad.read_zarr(tmp_path / "all.zarr")
    assert set(found.obs["batch"][-20:]) == {"q"}
    assert found.obs_names.is_unique


@pytest.mark.long
def test_scanpy_works_on_what_was_merged(atlas: Atlas, tmp_path: Path) -> None:
    sc = pytest.importorskip("scanpy")
    map_queries(atlas.model, atlas.query, tmp_path / "out", merge=tmp_path / "all.zarr", **QUICK).raise_if_failed()
    found = sc.read_zarr(tmp_path / "all.zarr") if hasattr(sc, "read_zarr") else ad.read_zarr(tmp_path / "all.zarr")
    sc.pp.neighbors(found, use_rep="X_scVI", n_neighbors=5)
    assert "connectivities" in found.obsp


def test_what_cannot_be_merged_is_told_before_anything_is_mapped(atlas: Atlas, tmp_path: Path) -> None:
    merge = tmp_path / "all.zarr"
    (tmp_path / "mine.zarr").mkdir()
    for queries, place, reason in (
        ({"reference": atlas.query}, merge, "is called 'reference'"),
        ({"q": atlas.query}, tmp_path / "all.h5ad", "end with .zarr"),
        ({"q": atlas.query}, tmp_path / "mine.zarr", "was not written by --merge"),
    ):
        with pytest.raises(UsageError, match=reason):
            map_queries(atlas.model, queries, tmp_path / "out", merge=place, **QUICK)
    shutil.copytree(atlas.model, tmp_path / "bare", ignore=shutil.ignore_patterns("latent.zarr"))
    with pytest.raises(UsageError, match=r"has no latent\.zarr"):
        map_queries(tmp_path / "bare", atlas.query, tmp_path / "out", merge=merge, **QUICK)
    assert not (tmp_path / "out").exists()


def test_nothing_is_merged_where_nothing_was_mapped(atlas: Atlas, tmp_path: Path) -> None:
    bad = ad.AnnData(np.ones((3, 2), np.float32))
    result = map_queries(atlas.model, {"bad": bad}, tmp_path / "out", merge=tmp_path / "all.zarr", **QUICK)
    assert result.merged is None
    assert not (tmp_path / "all.zarr").exists()


@pytest.mark.parametrize(
    ("out", "merge"), [("all.zarr", "all.zarr"), ("all.zarr/sub", "all.zarr"), ("out", "out/q.zarr")]
)
def test_what_was_merged_does_not_take_the_place_of_results(out: str, merge: str, atlas: Atlas, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"results of --out .* are to lie there"):
        map_queries(
            atlas.model,
            {"q": ad.read_h5ad(atlas.query)},
            tmp_path / out,
            merge=tmp_path / merge,
            results="zarr",
            **QUICK,
        )
    assert not list(tmp_path.iterdir())


def test_what_was_merged_is_no_result_of_a_query_of_its_name(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)[:40].copy()
    map_queries(atlas.model, {"q": cells}, tmp_path, merge=tmp_path / "other.zarr", results="zarr", **QUICK)
    shutil.rmtree(tmp_path / "q.zarr")
    shutil.copytree(tmp_path / "other.zarr", tmp_path / "q.zarr")
    (record,) = map_queries(atlas.model, {"q": cells}, tmp_path, results="zarr", **QUICK).queries
    assert record["state"] == "done"
    assert ad.read_zarr(tmp_path / "q.zarr").n_obs == 40
