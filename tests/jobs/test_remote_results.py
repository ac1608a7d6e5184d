"""Stores and latents that are written to a URL, and what reads them there: a real S3 server on the loopback."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import StorageError, UsageError
from scarcade.engine.published import is_there, published
from scarcade.engine.storage import Mirror
from scarcade.jobs.cli import main
from scarcade.jobs.embed import embed
from scarcade.jobs.inspect import inspect
from scarcade.jobs.latent import read_latent
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.score import score
from tests.jobs.conftest import Atlas
from tests.s3 import checked_keys, s3_server, through

Url = Callable[[str], str]


@pytest.fixture(scope="module")
def server(atlas: Atlas) -> Iterator[Url]:
    with s3_server() as url:
        Mirror(url("data")).push(atlas.store.path, "all.zarr")
        yield url


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCARCADE_CACHE", str(tmp_path / "cache"))


def test_a_made_store_goes_to_a_url(server: Url, tmp_path: Path) -> None:
    options = {"cells": 300, "genes": 20, "seed": 1}
    here = simulate(tmp_path / "here.zarr", **options)  # type: ignore[arg-type]
    there = simulate(server("made/a.zarr"), **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(here.read(0, 300)[2], there.read(0, 300)[2])
    with pytest.raises(StorageError, match="exists already"):
        simulate(server("made/a.zarr"), **options)  # type: ignore[arg-type]
    again = simulate(server("made/a.zarr"), cells=200, genes=20, replace=True)
    assert again.n_cells == 200
    assert again.verify() == []
    with pytest.raises(UsageError, match="whole bucket"):
        simulate(server(""), **options)  # type: ignore[arg-type]


def test_a_store_at_a_url_is_ingested_grows_and_is_left_as_it_is(server: Url, atlas: Atlas, tmp_path: Path) -> None:
    known = atlas.store.schema.batch.values
    for batch in known[:2]:
        cells = atlas.store.to_anndata([batch])
        cells.obs_names = [f"{batch}-{name}" for name in cells.obs_names]
        cells.write_h5ad(tmp_path / f"{batch}.h5ad")
    files = [str(tmp_path / f"{batch}.h5ad") for batch in known[:2]]
    out = server("ingested/atlas.zarr")
    told: list[str] = []
    first = ingest(files[:1], out, batch_key="batch", report=told.append)
    grown = ingest(files, out, batch_key="batch", append=True, report=told.append)
    assert grown.n_cells > first.n_cells
    assert ingest(files, out, batch_key="batch", report=told.append).fingerprint == grown.fingerprint
    assert "holds 2 of the 2 files already" in told[-1]
    at_once = ingest(files, tmp_path / "here.zarr", batch_key="batch", report=told.append)
    np.testing.assert_array_equal(grown.read(0, grown.n_cells)[1], at_once.read(0, at_once.n_cells)[1])


def test_a_latent_goes_to_a_url_and_is_scored_there(server: Url, atlas: Atlas, tmp_path: Path) -> None:
    Mirror(server("models")).push(atlas.model, "atlas")
    atlas.store.to_anndata(atlas.store.schema.batch.values[:2]).write_h5ad(tmp_path / "known.h5ad")
    here = embed(atlas.model, tmp_path / "known.h5ad", tmp_path / "here.zarr")
    Mirror(server("in")).push_file(tmp_path / "known.h5ad", "known.h5ad")
    there = embed(server("models/atlas"), server("in/known.h5ad"), server("latent/a.zarr"))
    assert there == server("latent/a.zarr")
    Mirror(server("latent")).pull("a.zarr", tmp_path / "back.zarr")
    np.testing.assert_array_equal(read_latent(here).mean, read_latent(tmp_path / "back.zarr").mean)
    assert score(str(there), batches="batch") == score(here, batches="batch")


def test_what_lies_at_a_url_is_looked_at(server: Url, atlas: Atlas, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(server("data/all.zarr"))
    assert (found["kind"], found["intact"], found["n_cells"]) == ("store", True, 2_000)
    assert main(["inspect", server("data/all.zarr"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_genes"] == 150
    Mirror(server("looked")).push(atlas.model, "model")
    assert inspect(server("looked/model"))["kind"] == "model"
    assert main(["inspect", server("looked/none")]) == 4


def test_a_command_ends_with_one_error_and_its_exit_code(
    server: Url, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--out", str(tmp_path / "run"), "--data"]
    cases = [
        ([*train, server("data/none.zarr")], 4, "there is no store"),
        ([*train, server("data/all.zarr").replace("s3://bucket/", "s3://buckett/")], 4, "no such bucket"),
        ([*train, through(server("data/all.zarr"), "http://127.0.0.1:9")], 5, "did not answer"),
        (["simulate", server("data/all.zarr"), "--cells", "10"], 2, "--force"),
        ([*train, server("data/all.zarr"), "--data.cache-gb", "-1"], 2, "--data.cache-gb"),
    ]
    for command, code, message in cases:
        assert main(command) == code
        said = capsys.readouterr().err
        assert message in said
        assert said.count("error:") == 1
    with checked_keys(server("")):
        assert main([*train, server("data/all.zarr")]) == 5
        assert "AWS_ACCESS_KEY_ID" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_was_computed_is_kept_if_it_cannot_be_copied(server: Url) -> None:
    out = server("kept/a.zarr")
    with checked_keys(out), pytest.raises(StorageError, match="refuses"), published(out):
        raise AssertionError("a store that refuses is told before anything is computed")
    with pytest.raises(StorageError, match="kept in") as told, published(out) as target:
        target.mkdir()
        (target / "x").write_text("hours of work")
        keys = checked_keys(out)
        keys.__enter__()
    keys.__exit__(None, None, None)
    kept = Path(str(told.value).rsplit("kept in ", 1)[1])
    assert (kept / "x").read_text() == "hours of work"
    assert not is_there(out)
    (kept / "x").unlink()
    kept.rmdir()
    kept.parent.rmdir()


def test_results_of_a_mapping_go_to_a_url_and_are_not_made_again(server: Url, atlas: Atlas, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2, "optim": {"lr": 0.01}}
    here = map_queries(atlas.model, atlas.query, tmp_path / "here", **options)
    out = server("mapped/a")
    told: list[str] = []
    there = map_queries(atlas.model, atlas.query, out, told=lambda name, line: told.append(str(line)), **options)
    assert there.out == out
    again = map_queries(atlas.model, atlas.query, out, told=lambda name, line: told.append(str(line)), **options)
    assert "was done already" in told[-1]
    assert again.queries[0]["state"] == "done"
    sizes = Mirror(out).sizes()
    assert {"summary.json", "summary.csv", "report.html", "donor.h5ad"} <= set(sizes)
    Mirror(out).pull_file("donor.h5ad", tmp_path / "donor.h5ad")
    mine, theirs = (ad.read_h5ad(path) for path in (tmp_path / "here" / "donor.h5ad", tmp_path / "donor.h5ad"))
    np.testing.assert_array_equal(mine.obsm["X_scVI"], theirs.obsm["X_scVI"])
    assert here.reference == there.reference
    assert not [path for path in (tmp_path / "cache" / "results").iterdir() if path.is_dir()]
    with pytest.raises(UsageError, match="folder that all of them share"):
        map_queries(atlas.model, atlas.query, out, workers=1, scale={"address": "10.0.0.1:6379"})
