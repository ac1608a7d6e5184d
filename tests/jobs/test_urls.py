"""Queries and references at URLs: a real S3 server and a real web server on the loopback."""

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scarcade.engine.errors import OpenError, StorageError
from scarcade.engine.storage import Mirror
from scarcade.jobs.fetched import fetched
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.queries import Task, tasks_of
from scarcade.models.saved import read
from tests.dataloaders.files import written
from tests.jobs.conftest import Atlas
from tests.s3 import s3_server

QUICK: dict[str, Any] = {"epochs": 2, "optim": {"lr": 0.01}}


@pytest.fixture(scope="module")
def bucket(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """A bucket with in/donor.h5ad, in/folder.zarr, in/broken.h5ad and a model."""
    folder = tmp_path_factory.mktemp("bucket")
    written(ad.read_h5ad(atlas.query)[:200].copy(), folder / "folder.zarr", version=3)
    (folder / "broken.h5ad").write_bytes(atlas.query.read_bytes()[:20_000])
    with s3_server() as url:
        mirror = Mirror(url("in"))
        mirror.push_file(atlas.query, "donor.h5ad")
        mirror.push_file(folder / "broken.h5ad", "broken.h5ad")
        mirror.push(folder / "folder.zarr", "folder.zarr")
        mirror.push_file(atlas.query, "deeper/a b%.h5ad")
        Mirror(url("models")).push(atlas.model, "atlas")
        yield url


def test_a_prefix_and_a_pattern_stand_for_the_queries_in_them(bucket: Callable[[str], str]) -> None:
    assert [task.name for task in tasks_of(bucket("in"))] == ["broken", "donor", "folder"]
    assert [task.name for task in tasks_of(bucket("in/d*.h5ad"))] == ["donor"]
    (task,) = tasks_of(bucket("in/deeper"))
    assert task.name == "a b%"
    with pytest.raises(OpenError, match=r"no \.h5ad or \.zarr"):
        tasks_of(bucket("nothing/there"))


def test_queries_are_mapped_from_an_object_store_onto_a_reference_in_it(
    bucket: Callable[[str], str], atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCARCADE_CACHE", str(tmp_path / "cache"))
    urls = [bucket(f"in/{name}") for name in ("donor.h5ad", "folder.zarr", "broken.h5ad", "none.h5ad", "none.zarr")]
    here = map_queries(atlas.model, {"donor": atlas.query}, tmp_path / "here", **QUICK)
    there = map_queries(bucket("models/atlas"), urls, tmp_path / "there", **QUICK)
    assert [record["state"] for record in there.queries] == ["done", "done", "failed", "failed", "failed"]
    assert [record["path"] for record in there.queries] == urls
    assert there.reference == here.reference
    assert "in/broken.h5ad" in there.queries[2]["reason"]
    assert "truncated" in there.queries[2]["reason"]
    for record in there.queries[3:]:
        assert "there is no such file or folder in the store" in record["reason"]
    one, other = (ad.read_h5ad(tmp_path / where / "donor.h5ad") for where in ("here", "there"))
    np.testing.assert_array_equal(one.obsm["X_scVI"], other.obsm["X_scVI"])
    assert json.loads(other.uns["scarcade"]["mapping"])["query"] == urls[0]
    left = {path.name for path in (tmp_path / "there").iterdir()}
    assert not [name for name in left if name.startswith(".tmp")]
    again = map_queries(bucket("models/atlas"), urls[:2], tmp_path / "there", **QUICK)
    assert again.queries == there.queries[:2]


@pytest.mark.long
def test_a_task_of_ray_fetches_its_own_query(bucket: Callable[[str], str], atlas: Atlas, tmp_path: Path) -> None:
    queries = {"url": bucket("in/donor.h5ad"), "memory": ad.read_h5ad(atlas.query)[:50].copy()}
    result = map_queries(atlas.model, queries, tmp_path, workers=1, threads=1, **QUICK)
    assert [record["state"] for record in result.queries] == ["done", "done"], result.queries
    assert result.queries[0]["path"] == queries["url"]
    assert not list(tmp_path.glob(".tmp*"))


def test_a_model_is_fetched_once_and_again_when_it_was_damaged(
    bucket: Callable[[str], str], atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scarcade.jobs.cached_model import local_model

    monkeypatch.setenv("SCARCADE_CACHE", str(tmp_path))
    first = local_model(bucket("models/atlas"))
    stamp = (first / "model.json").stat().st_ino
    assert local_model(bucket("models/atlas")) == first
    assert (first / "model.json").stat().st_ino == stamp
    assert read(first).fingerprint == read(atlas.model).fingerprint
    (first / "model.json").write_text("cut")
    assert read(local_model(bucket("models/atlas"))).fingerprint == read(atlas.model).fingerprint
    assert [path.name for path in (tmp_path / "models").iterdir()] == [first.name]
    with pytest.raises(OpenError, match=r"MANIFEST\.json"):
        local_model(bucket("models/none"))
    mirror = Mirror(bucket("models"))
    (tmp_path / "wrong").write_text("{}")
    mirror.push(atlas.model, "damaged")
    mirror.push_file(tmp_path / "wrong", "damaged/model.json")
    monkeypatch.setenv("SCARCADE_CACHE", str(tmp_path / "other"))
    with pytest.raises(Exception, match=r"model\.json"):
        local_model(bucket("models/damaged"))


def test_a_name_in_the_store_cannot_lead_out_of_the_folder(bucket: Callable[[str], str], tmp_path: Path) -> None:
    place = bucket("").split("endpoint_override=")[1].split("&")[0].replace("%3A", ":").replace("%2F", "/")
    request = urllib.request.Request(f"{place}/bucket/hostile.zarr/%2E%2E/%2E%2E/out", data=b"x", method="PUT")
    urllib.request.urlopen(request).close()
    with (
        pytest.raises(OpenError, match="outside of the folder"),
        fetched(Task("hostile", bucket("hostile.zarr")), tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_is_not_there_is_told_before_anything_starts(bucket: Callable[[str], str]) -> None:
    with pytest.raises(OpenError, match="no bucket 'nobucket'"):
        tasks_of(bucket("in/donor.h5ad").replace("s3://bucket/", "s3://nobucket/"))


def test_wrong_credentials_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as url:
        place = url("").split("endpoint_override=")[1].split("&")[0].replace("%3A", ":").replace("%2F", "/")
        checking = urllib.request.Request(
            f"{place}/moto-api/reset-auth",
            data=b"0",
            method="POST",
            headers={"Content-Type": "application/octet-stream"},
        )
        urllib.request.urlopen(checking).close()
        try:
            for given in (url("in/donor.h5ad"), url("in"), url("in/*.zarr")):
                with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
                    tasks_of(given)
        finally:
            checking.data = b"inf"
            urllib.request.urlopen(checking).close()


def test_keys_in_a_url_are_not_recorded() -> None:
    assert Task("q", "s3://key:secret@bucket/q.h5ad").path == "s3://***@bucket/q.h5ad"


@pytest.fixture
def server(atlas: Atlas) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(atlas.query.parent))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_a_file_of_a_web_server_or_of_a_file_url_is_a_query(server: str, atlas: Atlas, tmp_path: Path) -> None:
    urls = [f"{server}/donor.h5ad", f"{server}/none.h5ad", atlas.query.as_uri()]
    result = map_queries(atlas.model, urls, tmp_path, **QUICK)
    assert [record["state"] for record in result.queries] == ["done", "failed", "done"]
    assert [record["path"] for record in result.queries] == urls
    assert "404" in result.queries[1]["reason"]
    assert atlas.query.is_file()
    with pytest.raises(OpenError, match="no list of files"):
        tasks_of(f"{server}/folder")
