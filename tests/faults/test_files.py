"""Every file that cannot be used ends in its own error, exit code 4, at once, and with nothing half-written."""

import json
import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pytest

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.schema import read_query
from scarcade.dataloaders.source import AnnDataFile
from scarcade.engine.errors import InputError, OpenError
from scarcade.engine.schema import Categories, Schema
from tests.dataloaders.files import adata, quiet, written


def edited(path: Path, part: str, change: Callable[[np.ndarray], Any]) -> None:
    with h5py.File(path, "r+") as file:
        values = file["X"][part][:]
        change(values)
        file["X"][part][:] = values


def put(at: int, value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[at] = value

    return change


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20_000])


def twice(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        names = file["var"]["_index"][:]
        names[3] = names[4]
        del file["var"]["_index"]
        file["var"]["_index"] = names
        file["var"]["_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def external(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink("/etc/passwd", "/X")


BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a column index out of range": (lambda p: edited(p, "indices", put(5, 99)), "E_CSR", r"outside of 0\.\.19.*'c0'"),
    "a negative column index": (lambda p: edited(p, "indices", put(5, -1)), "E_CSR", r"outside of 0\.\.19"),
    "a gene twice in a cell": (lambda p: edited(p, "indices", lambda v: put(1, v[0])(v)), "E_CSR", "more than once"),
    "row pointers beyond the values": (lambda p: edited(p, "indptr", put(7, 10**6)), "E_CSR", "indptr of cell 7"),
    "row pointers that descend": (lambda p: edited(p, "indptr", put(30, 0)), "E_CSR", "indptr gives cell"),
    "NaN": (lambda p: edited(p, "data", put(5, np.nan)), "E_COUNTS", r"'c0', gene 'g\d\d', nan"),
    "a negative count": (lambda p: edited(p, "data", put(5, -2)), "E_COUNTS", r"'c0', gene 'g\d\d', -2"),
    "a fraction": (lambda p: edited(p, "data", put(5, 2.5)), "E_COUNTS", r"'c0', gene 'g\d\d', 2\.5"),
    "a duplicate gene": (twice, "E_GENES", "1 gene names stand more than once: g04"),
    "an empty file": (lambda p: p.write_bytes(b""), "E_OPEN", "broken.h5ad: is not a readable .h5ad file"),
    "text": (lambda p: p.write_bytes(b"hello" * 1000), "E_OPEN", "is not a readable .h5ad file"),
    "a truncated file": (truncate, "E_OPEN", "the file is truncated"),
    "a link out of the file": (external, "E_OPEN", "points into another file"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_h5ad_is_its_own_error_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    change, code, text = BROKEN[what]
    broken = written(adata(), tmp_path / "broken.h5ad")
    change(broken)
    good = written(adata(seed=1), tmp_path / "good.h5ad")
    before = sorted(tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match=text) as told:
            ingest([good, broken], tmp_path / "out.zarr", layer="X", report=quiet)
    assert (told.value.code, told.value.exit_code) == (code, 4)
    assert "broken.h5ad" in str(told.value)
    assert sorted(tmp_path.iterdir()) == before
    schema = Schema(tuple(f"g{i:02d}" for i in range(20)), Categories("batch", ()))
    with pytest.raises(InputError) as told:
        read_query(broken, schema, layer="X")
    assert told.value.code == code


@contextmanager
def as_anybody() -> Iterator[None]:
    """For root, which may read every file: as nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_may_not_be_read_says_so() -> None:
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = written(adata(), Path(folder) / "a.h5ad")
        AnnDataFile(path).close()  # what looks through files is started, as nobody could not
        path.chmod(0)
        with as_anybody(), pytest.raises(OpenError, match=r"a\.h5ad: cannot be read \(permission denied\)$"):
            AnnDataFile(path)


def test_a_query_without_a_gene_in_common(tmp_path: Path) -> None:
    path = written(adata(), tmp_path / "a.h5ad")
    with pytest.raises(InputError, match="wanted are Ensembl ids") as told:
        read_query(path, Schema((f"ENSG{1:011d}",), Categories("batch", ())))
    assert (told.value.code, told.value.exit_code) == ("E_GENES", 4)


@pytest.mark.long
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("part", ["X/data", "X/indices", "var/_index", "obs/_index"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_missing_chunk_of_a_foreign_zarr_is_never_zeros(tmp_path: Path, version: int, part: str, how: str) -> None:
    path = written(adata(), tmp_path / "a.zarr", version=version)
    chunk = next(p for p in (path / part).rglob("*") if p.is_file() and not p.name.startswith((".z", "zarr.")))
    if how == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(b"")
    with pytest.raises(InputError, match="1 of 1 chunks are missing or empty") as told:
        ingest(path, tmp_path / "out.zarr", report=quiet)
    assert told.value.code == "E_MISSING_CHUNK"


def meta(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def bomb_h5_values(path: Path) -> Path:
    target = written(adata(), path / "bomb.h5ad")
    with h5py.File(target, "r+") as file:
        for part in ("data", "indices"):
            del file["X"][part]
            file["X"].create_dataset(part, (10**13,), "i4", chunks=(10**6,))
    return target


def bomb_h5_shape(path: Path) -> Path:
    target = written(adata(), path / "bomb.h5ad")
    with h5py.File(target, "r+") as file:
        file["X"].attrs["shape"] = np.array([10**13, 20])
    return target


def bomb_h5_chunk(path: Path) -> Path:
    target = written(adata(), path / "bomb.h5ad")
    with h5py.File(target, "r+") as file:
        del file["X"]["data"]
        file["X"].create_dataset("data", (10**10,), "f4", chunks=(10**9 - 1,))
    return target


def bomb_zarr(version: int, key: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        target = written(adata(), path / "bomb.zarr", version=version)
        name = target / "X" / "data" / ("zarr.json" if version == 3 else ".zarray")

        def change(raw: dict[str, Any]) -> None:
            if key == "shape":
                raw["shape"] = [10**13]
            elif version == 3:
                raw["chunk_grid"]["configuration"]["chunk_shape"] = [10**13]
            else:
                raw["chunks"] = [10**13]

        meta(name, change)
        return target

    return make


@pytest.mark.parametrize(
    "make",
    [
        bomb_h5_values,
        bomb_h5_shape,
        bomb_h5_chunk,
        *(bomb_zarr(version, key) for version in (2, 3) for key in ("shape", "chunk")),
    ],
)
def test_a_bomb_is_refused_from_its_metadata(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    with AnnDataFile(written(adata(), tmp_path / "first.h5ad")):
        pass  # what is started once is started
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(InputError) as told:
        ingest(path, tmp_path / "out.zarr", layer="X", report=quiet)
    assert told.value.code == "E_LIMIT", told.value
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_links_that_leave_a_zarr_are_not_followed(tmp_path: Path) -> None:
    path = written(adata(), tmp_path / "a.zarr")
    shutil.move(path / "obs", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path / "obs")
    with pytest.raises(InputError, match="a link that leaves the folder is not followed") as told:
        ingest(path, tmp_path / "out.zarr", report=quiet)
    assert told.value.code == "E_OPEN"


@pytest.mark.parametrize("version", [2, 3])
def test_codecs_that_are_not_on_the_list_are_not_run(tmp_path: Path, version: int) -> None:
    path = written(adata(), tmp_path / "a.zarr", version=version)
    name = path / "obs" / "batch" / "categories" / ("zarr.json" if version == 3 else ".zarray")

    def change(raw: dict[str, Any]) -> None:
        if version == 3:
            raw["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
        else:
            raw["filters"] = [{"id": "pickle"}]

    meta(name, change)
    with pytest.raises(InputError, match=r"codec .*pickle is not on the list") as told:
        ingest(path, tmp_path / "out.zarr", report=quiet)
    assert told.value.code == "E_OPEN"


def test_folders_that_are_no_anndata(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match=r"no \.h5ad or .zarr is there"):
        ingest(tmp_path / "plain", tmp_path / "out.zarr", report=quiet)
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["x"] = [1]
    with pytest.raises(InputError, match="is not AnnData: it has no obs and no var"):
        ingest(tmp_path / "other.h5ad", tmp_path / "out.zarr", report=quiet)
