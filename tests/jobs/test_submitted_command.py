"""A command line for the cluster: understood here, with paths that mean the same there."""

import inspect
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from scarcade.engine.errors import UsageError
from scarcade.jobs.commands import app
from scarcade.jobs.submitted_command import PATHS, SENT, understood

TRAIN = ["train", "--data", "/shared/atlas.zarr", "--out", "s3://bucket/runs/blood"]


def test_every_path_of_every_command_is_known() -> None:
    for name in app:
        if name.startswith("-") or name in ("submit", "jobs"):
            continue
        function = app[name].default_command
        assert function is not None, name
        signature = inspect.signature(function, eval_str=True)
        for key, parameter in signature.parameters.items():
            if "Path" in str(parameter.annotation) and key != "common":
                assert key in PATHS | SENT, f"{name}: {key}"


def test_the_id_is_of_the_kind_and_of_what_is_written() -> None:
    first = understood(TRAIN).ident
    assert first.startswith("train-blood-")
    assert understood([*TRAIN, "--epochs", "3"]).ident == first
    assert understood([*TRAIN[:-1], "s3://bucket/runs/blood/"]).ident == first
    assert understood([*TRAIN[:-1], "s3://other/runs/blood"]).ident != first
    assert understood(["inspect", "/shared/a"]).ident != understood(["inspect", "/shared/b"]).ident
    assert understood(["inspect", "/shared/a"]).ident.startswith("inspect-")


def test_places_that_must_be_shared_are_told() -> None:
    assert understood(TRAIN).places == ("/shared/atlas.zarr",)
    line = understood(["map", "s3://b/model", "/q/a.h5ad", "s3://b/c.h5ad", "--out", "/q/mapped"])
    assert set(line.places) == {"/q/a.h5ad", "/q/mapped"}


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--data", "atlas.zarr", "--out", "/x"],
        ["train", "--data", "/x", "--out", "runs/a"],
        ["map", "/model", "a.h5ad", "--out", "/x"],
        ["map", "runs/a/model", "/a.h5ad", "--out", "/x"],
        ["ingest", "a.h5ad", "--out", "/x"],
        ["embed", "/model", "~/a.h5ad", "--out", "/x"],
        ["demo"],
    ],
)
def test_a_path_of_this_machine_is_refused(argv: list[str]) -> None:
    if argv == ["demo"]:
        argv = ["demo", "--out", "demo"]
    with pytest.raises(UsageError, match="absolute path on storage that every node sees"):
        understood(argv)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "wants a command"),
        (["merge", "s3://bucket/model", "/x.delta", "--out", "/whole"], "takes no URL"),
        (["submit", "--", "train"], "runs here"),
        (["jobs", "list"], "runs here"),
        (["train", "--help"], "leave --help out"),
        ([*TRAIN, "--scale.address", "head:6379"], "leave it out"),
        ([*TRAIN, "--model.n-layer", "2"], "n-layer"),
    ],
)
def test_what_cannot_be_meant(argv: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        understood(argv)


def test_a_wrong_option_ends_here() -> None:
    with pytest.raises(CycloptsError, match="--epoch"):
        understood([*TRAIN, "--epoch", "3"])
    with pytest.raises(CycloptsError):
        understood(["fly"])


def test_small_files_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/train.toml").write_text('data = "/shared/atlas.zarr"\nout = "/shared/run"\n')
    line = understood(["train", "--config", "in/train.toml"])
    assert line.sent == {"in/train.toml": Path("in/train.toml")}
    assert line.ident.startswith("train-run-")
    assert line.places == ("/shared/atlas.zarr", "/shared/run")
    away = tmp_path / "in" / "train.toml"
    line = understood(["train", f"--config={away}"])
    assert line.argv == ("train", "--config=sent/0-train.toml")
    assert line.sent == {"sent/0-train.toml": away}
    Path("genes.txt").write_text("A\n")
    ingest = ["ingest", "/shared/a.h5ad", "--out", "/shared/b.zarr"]
    assert list(understood([*ingest, "--genes", "genes.txt"]).sent) == ["genes.txt"]
    assert understood(ingest).sent == {}
    assert understood([*ingest, "--genes", "intersection"]).sent == {}
    assert understood([*ingest, "--genes", "/shared/genes.txt"]).sent == {}  # perhaps it is there


def test_a_relative_path_in_the_file_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.toml").write_text('data = "atlas.zarr"\nout = "/shared/run"\n')
    with pytest.raises(UsageError, match=r"atlas\.zarr"):
        understood(["train", "--config", "train.toml"])
