"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

from scarcade.jobs.cli import main

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    accuracy, report = capsys.readouterr().out.split()
    assert float(accuracy) > 0.4
    assert Path(report).is_file()


def test_every_option_that_is_shown_exists(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join([README, *(page.read_text() for page in sorted(DOCS.glob("*.md")))])
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    shown = re.findall(
        r"^\$? *scarcade (jobs [a-z]+|[a-z]+)(?: (.*))?$", blocks.replace(" -- ", "\nscarcade "), re.MULTILINE
    )
    assert len(shown) > 5
    known: dict[str, str] = {}
    for command, rest in shown:
        if command not in known:
            assert main([*command.split(), "--help"]) == 0, command
            known[command] = capsys.readouterr().out
        for option in re.findall(r"(?<=\s)--[a-z][\w.-]*", f" {rest}"):
            assert re.search(rf"{re.escape(option)}\b", known[command]), f"scarcade {command} {option}"


def test_every_page_that_is_linked_exists() -> None:
    root = DOCS.parent
    for page in (root / "README.md", root / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_errors_is_the_tree_of_errors() -> None:
    from scarcade.engine import errors

    rows = re.findall(r"^\| `(\w+Error)`.*?\| `(\w+)` \| (\d+) \|$", (DOCS / "errors.md").read_text(), re.MULTILINE)
    root = errors.ScarcadeError
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, root) and k is not root]
    assert sorted(rows) == sorted((k.__name__, k.code, str(k.exit_code)) for k in kinds)
