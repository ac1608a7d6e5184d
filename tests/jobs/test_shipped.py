"""The wheel that travels with a job, and small files."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scarcade import __version__
from scarcade.engine.errors import InputError
from scarcade.jobs.shipped import package_files, package_name, small_files, wheel

ROOT = Path(__file__).parents[2]


def test_it_holds_every_file_of_the_four_folders() -> None:
    inside = package_files()
    for folder in ("engine", "dataloaders", "models", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"scarcade/{path.relative_to(ROOT).as_posix()}" in inside
    assert {Path(name).suffix for name in inside} >= {".py", ".html", ".js"}
    assert "scarcade/py.typed" in inside
    assert not any("__pycache__" in name for name in inside)


def test_the_same_files_make_the_same_wheel() -> None:
    files = package_files()
    assert wheel(files) == wheel(files)
    changed = {**files, "scarcade/jobs/cli.py": b""}
    assert package_name(wheel(changed)) != package_name(wheel(files))


def test_pip_takes_it_and_it_runs_from_where_it_lies(tmp_path: Path) -> None:
    file = tmp_path / f"scarcade-{__version__}-py3-none-any.whl"
    file.write_bytes(wheel())
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--target"]
    subprocess.run([*command, str(tmp_path / "there"), str(file)], check=True, timeout=120)
    with zipfile.ZipFile(io.BytesIO(wheel())) as whole:
        whole.extractall(tmp_path / "unzipped")
    code = "import scarcade.jobs.cli, importlib.metadata as m; print(scarcade.__file__, m.version('scarcade'))"
    for folder in ("there", "unzipped"):
        environment = {"PYTHONPATH": str(tmp_path / folder), "PATH": ""}
        done = subprocess.run(  # noqa: PLW1510  (what it says is looked at first)
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
        )
        assert done.stdout.split() == [str(tmp_path / folder / "scarcade" / "__init__.py"), __version__], done.stderr
        assert not list((tmp_path / folder / "scarcade").rglob("*.toml"))


def test_the_entry_says_what_an_environment_lacks(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(wheel())) as whole:
        whole.extractall(tmp_path)
    (info,) = tmp_path.glob("*.dist-info")
    text = (info / "METADATA").read_text()
    assert "Requires-Dist: torch" in text
    assert "extra ==" not in text
    (info / "METADATA").write_text(
        text.replace("Requires-Dist: torch>=2.6", "Requires-Dist: torch>=999").rstrip()
        + "\nRequires-Dist: no-such-thing>=2\nRequires-Dist: not-for-us; python_version < '3'\n"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(  # noqa: PLW1510
        [sys.executable, "-m", "scarcade.jobs.job_entry", "simulate", str(tmp_path / "x.zarr")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 5
    assert "torch>=999 is wanted" in done.stderr
    assert "no-such-thing>=2 is not installed" in done.stderr
    assert "not-for-us" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_files_that_cannot_travel(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        small_files({"a": tmp_path / "a.toml"})
    (tmp_path / "big.gmt").write_bytes(b"x" * 10_000_001)
    with pytest.raises(InputError, match="10 MB"):
        small_files({"a": tmp_path / "big.gmt"})
