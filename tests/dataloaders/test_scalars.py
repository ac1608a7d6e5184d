"""Single values as anndata writes them, read without it."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import zarr

from scarcade.dataloaders.scalars import read_scalar
from scarcade.dataloaders.stored_files import LocalFiles
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import CorruptError, MissingChunkError


def manifest_of(folder: Path) -> dict[str, Any]:
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        }
    }


def written(folder: Path, value: Any) -> tuple[LocalFiles, dict[str, Any]]:
    """`value` as the element "one" of a zarr group at `folder`."""
    ad.io.write_elem(zarr.open_group(folder, mode="w", zarr_format=3), "one", value)
    return LocalFiles(folder), manifest_of(folder)


@pytest.mark.parametrize("value", ["", "naïve T", "x" * 100_000, 0, 7, -3, np.int64(2**40), 0.0, 2.5, np.float32(0.5)])
def test_it_is_what_anndata_reads(value: Any, tmp_path: Path) -> None:
    files, manifest = written(tmp_path / "a.zarr", value)
    found = read_scalar(files, "one", manifest)
    assert found == ad.io.read_elem(zarr.open_group(tmp_path / "a.zarr", mode="r")["one"])
    assert found == value


def test_what_is_not_one_value_is_left_to_anndata(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3).create_array("one", data=np.arange(3))
    assert read_scalar(LocalFiles(tmp_path / "a.zarr"), "one", manifest_of(tmp_path / "a.zarr")) is None


def test_changed_bytes_are_an_error(tmp_path: Path) -> None:
    files, manifest = written(tmp_path / "a.zarr", "a sentence")
    (tmp_path / "a.zarr" / "one" / "c").write_bytes(b"something else")
    with pytest.raises(CorruptError, match="one/c"):
        read_scalar(files, "one", manifest)
    with pytest.raises(CorruptError, match="not of our making"):
        read_scalar(files, "one", manifest_of(tmp_path / "a.zarr"))
    (tmp_path / "a.zarr" / "one" / "c").unlink()
    with pytest.raises(MissingChunkError):
        read_scalar(files, "one", manifest)


def test_a_store_is_opened_without_anndata(tmp_path: Path) -> None:
    simulate(tmp_path / "a.zarr", cells=60, genes=20, batches=2, labels=2, seed=0)
    code = (
        "import sys; from scarcade.dataloaders.store import open_store; open_store(sys.argv[1]); "
        "print({'anndata', 'dask', 'zarr'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.zarr")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
