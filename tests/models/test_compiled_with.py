"""What is compiled with functions of other files says of which: numba's cache looks at a function's own file alone.

An installation that takes a new `likelihood_kernel.py` and an old cache would otherwise go on with old code in every
kernel that has functions of it. ``python -m tests.models.test_compiled_with`` writes these lines anew.
"""

import ast
import hashlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^# compiled with: (\w+)$", re.MULTILINE)


FILES = {path for folder in ("engine", "models", "dataloaders") for path in (ROOT / folder).glob("*.py")}
PUT_IN = {path for path in FILES if re.search(r"forceinline=True|inline=\"always\"|intrinsic\(", path.read_text())}


def _imported(path: Path) -> set[Path]:
    """The files that a file takes compiled functions from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scarcade."):
            module = ROOT.joinpath(*str(node.module).split(".")[1:])
            found |= {module.with_suffix(".py")} | {module / f"{alias.name}.py" for alias in node.names}
    return found & PUT_IN


@cache
def _below(path: Path) -> frozenset[Path]:
    """And those that they take from."""
    own = _imported(path) - {path}
    return frozenset(own | {further for one in own for further in _below(one)} - {path})


def _mark(path: Path) -> str:
    """Of the other files' code, without their own marks."""
    text = "".join(re.sub(r"\n# compiled with: \w+\n", "", one.read_text()) for one in sorted(_below(path)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# a file without a cache of its own needs no mark: jobs are compiled by `crew.compiled`, which keeps them
KEPT = {path for path in FILES if re.search(r"cache=(?!False)|^def job\(", path.read_text(), re.MULTILINE)}
TAKING = sorted(path for path in KEPT if _below(path))


@pytest.mark.parametrize("path", TAKING, ids=[path.stem for path in TAKING])
def test_it_says_with_what(path: Path) -> None:
    found = MARK.findall(path.read_text())
    assert found == [_mark(path)], f"{path.name} must have the line: # compiled with: {_mark(path)}"


def test_it_is_looked_at() -> None:
    assert {"head_job", "adam_job", "crew", "normal_kernel", "sparse_kernel"} <= {path.stem for path in TAKING}


def _written(text: str, line: str) -> str:
    if MARK.search(text):
        return MARK.sub(line, text)
    after = ast.parse(text).body[0].end_lineno  # the docstring
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:after], f"\n{line}\n", *lines[after:]])


if __name__ == "__main__":
    for path in TAKING:
        path.write_text(_written(path.read_text(), f"# compiled with: {_mark(path)}"))
