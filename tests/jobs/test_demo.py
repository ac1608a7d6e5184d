"""The demonstration, small: it ends with an accuracy, continues, and never touches a folder that is not its own."""

import json
from pathlib import Path

import pytest

from scarcade.engine.errors import UsageError
from scarcade.jobs.demo import HELD_OUT, demo


def test_a_demonstration_runs_continues_and_starts_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    first = demo(out, cells=1_500, workers=0)
    summary = json.loads((out / "mapped" / "summary.json").read_text())
    assert [query["state"] for query in summary["queries"]] == ["done"] * HELD_OUT
    accuracy = float(first.splitlines()[-2].partition("%")[0])
    assert accuracy > 25  # a short run of few cells; chance is 12.5
    assert str(out / "mapped" / "report.html") in first

    stamp = (out / "run" / "model" / "MANIFEST.json").stat().st_mtime_ns
    (out / "mapped" / "batch8.h5ad").unlink()
    again = demo(out, cells=1_500, workers=0)
    assert again.splitlines()[-2] == first.splitlines()[-2]
    assert (out / "run" / "model" / "MANIFEST.json").stat().st_mtime_ns == stamp

    with pytest.raises(UsageError, match="--force"):
        demo(out, cells=2_000, workers=0)


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="another folder"):
        demo(tmp_path, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
