"""What pages of the docs show in Python runs as it stands there."""

import re
from pathlib import Path

import pytest

from scarcade.models import MODELS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def shown(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Python of a page, in a folder of its own."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
    monkeypatch.chdir(folder)
    exec(compile(code, page, "exec"), {})


def test_a_reference_is_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown("update.md", tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert "('batch0', 'batch1', 'batch2')" in out
    assert "['surgery', 'surgery']" in out


def test_outputs_are_written_and_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown("outputs.md", tmp_path, monkeypatch)
    assert "layers: 'scanvi_expression'" in capsys.readouterr().out


def test_every_model_has_a_page_and_its_outputs_are_told() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| (`.*) \|$", (DOCS / "outputs.md").read_text(), re.MULTILINE))
    for name, kind in MODELS.items():
        text = (DOCS / "models" / f"{name}.md").read_text()
        assert kind.obsm_key in text, name
        assert "deviations" in text, name
        told = set(re.findall(r"`(\w+)`", rows[name])) - {"probabilities"}
        assert told == set(kind.outputs) - {"genes"}, name  # "genes" is an older name of totalVI's expression
