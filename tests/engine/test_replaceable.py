"""--force takes away an older result of ours, and nothing else."""

import json
from pathlib import Path

import pytest

from scarcade.engine.errors import UsageError
from scarcade.engine.folder import committed
from scarcade.engine.replaceable import check_replaceable


def _made(path: Path, kind: str | None) -> Path:
    with committed(path, extra={} if kind is None else {"kind": kind}) as work:
        (work / "content").write_text("x")
    return path


def test_what_is_of_the_same_kind_may_be_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new", "store")
    check_replaceable(_made(tmp_path / "a.zarr", "store"), "store", [tmp_path / "b.h5ad", object(), None])
    (tmp_path / "empty").mkdir()
    check_replaceable(tmp_path / "empty", "model")
    damaged = _made(tmp_path / "damaged", "store")
    (damaged / "MANIFEST.json").write_text('{"kin')
    check_replaceable(damaged, "store")
    check_replaceable(_made(tmp_path / "old", None), "store")  # before manifests named kinds


@pytest.mark.parametrize(("kind", "told"), [("latent", "is a latent"), ("merged", r"is of another kind \(merged\)")])
def test_another_kind_is_left_alone(tmp_path: Path, kind: str, told: str) -> None:
    with pytest.raises(UsageError, match=f"a: {told}, and --force puts a store in the place of such a one alone"):
        check_replaceable(_made(tmp_path / "a", kind), "store")


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "a.h5ad").write_bytes(b"mine")
    for name in ("notes", "a.h5ad"):
        with pytest.raises(UsageError, match=f"{name}: was not made by scarcade"):
            check_replaceable(tmp_path / name, "store")


def test_inputs_are_left_alone(tmp_path: Path) -> None:
    store = _made(tmp_path / "in" / "a.zarr", "store")
    for out in (store, store / "latent", tmp_path / "in", tmp_path / "in" / ".." / "in" / "a.zarr"):
        with pytest.raises(UsageError, match=r"is, holds or lies in .*a\.zarr, which is read; choose another --out"):
            check_replaceable(out, "store", [store])
    (tmp_path / "link").symlink_to(store)
    with pytest.raises(UsageError, match="which is read"):
        check_replaceable(tmp_path / "link", "store", [store])
    for url in ("s3://b/a.zarr", "s3://b/a.zarr/latent", "s3://b"):
        with pytest.raises(UsageError, match="which is read"):
            check_replaceable(url, "store", ["s3://b/a.zarr/"])


def test_a_folder_at_a_url_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="was not made by scarcade"):
        check_replaceable(f"file://{tmp_path}/mine", "store")
    (tmp_path / "mine" / "MANIFEST.json").write_text(json.dumps({"kind": "store"}))
    check_replaceable(f"file://{tmp_path}/mine", "store")
    check_replaceable(f"file://{tmp_path}/new", "store")
