"""The law of the house, held by walking every import: engine <- dataloaders, engine <- models, jobs on all three."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDS_ON = {
    "engine": {"engine"},
    "dataloaders": {"engine", "dataloaders"},
    "models": {"engine", "models"},
    "jobs": {"engine", "dataloaders", "models", "jobs"},
}
SOURCES = sorted(path for floor in STANDS_ON for path in (ROOT / floor).rglob("*.py"))
OURS = (*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py")))


def imports(source: str, package: str = "") -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: counted from the package that the file lies in
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def of(path: Path) -> list[tuple[int, str]]:
    package = ".".join(("scarcade", *path.relative_to(ROOT).parent.parts))
    return list(imports(path.read_text(), package))


def upward(floor: str, found: list[tuple[int, str]]) -> list[str]:
    """Those imports that a file on `floor` must not make."""
    wrong = []
    for line, name in found:
        head, *rest = name.split(".")
        if head in STANDS_ON:
            wrong.append(f"line {line}: bare `{name}`; say scarcade.{name}")
        elif head == "scarcade" and floor != "jobs" and (not rest or rest[0] not in STANDS_ON[floor] | {"__version__"}):
            # `scarcade` alone gives names of every floor; its version is the one thing that stands under all
            wrong.append(f"line {line}: {name}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_arrow_goes_up(path: Path) -> None:
    assert upward(path.relative_to(ROOT).parts[0], of(path)) == []


@pytest.mark.parametrize(
    ("floor", "line"),
    [
        ("engine", "from scarcade.models.scvi import Scvi"),
        ("engine", "from scarcade import train"),
        ("engine", "def f():\n    import scarcade.dataloaders.store"),
        ("engine", "import scarcade"),
        ("models", "from scarcade.dataloaders import plan"),
        ("dataloaders", "from scarcade.models import MODELS"),
        ("dataloaders", "from scarcade.jobs.cli import main"),
        ("models", "from ..jobs import cli"),
        ("jobs", "import engine"),
        ("jobs", "from models.scvi import Scvi"),
    ],
)
def test_the_walk_finds_arrows_that_go_up(floor: str, line: str) -> None:
    assert upward(floor, list(imports(line, f"scarcade.{floor}")))


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nobody_imports_the_folders_by_their_bare_names(path: Path) -> None:
    assert [f"line {line}: {name}" for line, name in of(path) if name.split(".")[0] in STANDS_ON] == []


@cache
def names_in(path: Path) -> frozenset[str]:
    """Everything that a file imports, and every dotted name in it."""
    tree = ast.parse(path.read_text())
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return frozenset({imported for _, imported in of(path)} | attributes)


def users(name: str) -> set[str]:
    """The source files that import `name` or something below it, or reach it as an attribute."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(used == name or used.startswith(f"{name}.") for used in names_in(path))
    }


def test_collectives_are_reached_through_one_file() -> None:
    assert users("torch.distributed") <= {"engine/world.py"}


def test_ray_stands_at_the_rim() -> None:
    assert users("ray.train") <= {"engine/launch.py", "engine/train_here.py", "engine/in_worker.py"}
    above = {name for name in users("ray") if not name.startswith("jobs/")}
    assert above <= {
        "engine/launch.py",
        "engine/train_here.py",
        "engine/in_worker.py",
        "engine/cluster.py",
        "engine/bare_head.py",
        "engine/mailbox.py",
        "engine/nodes.py",
        "dataloaders/ingest.py",
    }


@pytest.mark.parametrize("name", ["pickle", "cloudpickle", "dill", "joblib", "torch.load", "torch.save"])
def test_nothing_is_pickled(name: str) -> None:
    # two files know the format: the restricted unpickler of foreign models, which runs in a process of its own, and
    # what writes models in the formats of other tools (decision 016)
    reads, writes = {"models/interop/unpickle.py"}, {"models/interop/written.py"}
    assert users(name) <= {"pickle": reads | writes, "torch.save": writes}.get(name, set())
    assert users("scarcade.models.interop.written") <= {
        "models/interop/to_scvi_tools.py",
        "models/interop/to_scarches.py",
    }


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [path for path in OURS if path.stem in {"utils", "util", "helpers", "common", "misc", "base"}] == []
