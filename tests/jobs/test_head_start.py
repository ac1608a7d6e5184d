"""Which command lines are given a Ray session before they are understood."""

from pathlib import Path

import pytest

from scarcade.engine.cores import cores
from scarcade.engine.scale import Scale
from scarcade.jobs.head_start import wanted

TRAIN = ["train", "--data", "a.zarr", "--out"]


@pytest.mark.parametrize("options", [["--workers", "2"], ["--workers=3", "--threads", "2"], ["--workers", "64"]])
def test_it_is_the_session_that_the_training_asks_for(options: list[str], tmp_path: Path) -> None:
    workers = int(options[0].partition("=")[2] or options[1])
    scale = Scale(workers=workers, threads=2 if "--threads" in options else None)
    needed = max(cores(), round(scale.grant(private=True)[0] * workers))
    assert wanted([*TRAIN, str(tmp_path / "run"), *options]) == needed


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--workers", "0"],
        ["--workers", "many"],
        ["--workers"],
        ["--workers", "2", "--scale.address", "head:6379"],
        ["--workers", "2", "--config", "train.toml"],
    ],
)
def test_where_it_is_not_plain_nothing_begins(options: list[str], tmp_path: Path) -> None:
    assert wanted([*TRAIN, str(tmp_path / "run"), *options]) is None
    assert wanted(["tune", "--out", str(tmp_path / "run"), "--workers", "2"]) is None


def test_a_cluster_that_the_environment_names_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert wanted([*TRAIN, str(tmp_path / "run"), "--workers", "2"]) is None


def test_a_run_that_is_over_needs_none(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").touch()
    assert wanted([*TRAIN, str(tmp_path), "--workers", "2"]) is None
