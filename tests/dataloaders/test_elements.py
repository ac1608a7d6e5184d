"""Elements written without anndata are those that anndata and zarr read."""

import json
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr

from scarcade.dataloaders.elements import consolidate, write_element, write_group
from scarcade.dataloaders.scalars import read_scalar
from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.stored_files import LocalFiles
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.quiet import quiet

VALUES = {
    "text": "kidney, \N{GREEK SMALL LETTER ALPHA}\n",
    "empty": "",
    "number": 7,
    "nothing": 0,
    "fraction": 0.25,
    "flag": True,
    "counts": np.arange(12, dtype=np.uint16).reshape(3, 4),
    "bytes": np.array([0, 1], np.int8),
    "zeros": np.zeros((2, 3), np.float32),
    "flags": np.array([True, False]),
    "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">i4"),
    "none": np.zeros((0, 2), np.float32),
    "texts": np.array(["a", "", "gene-\N{GREEK SMALL LETTER BETA}"], object),
    "no_texts": np.zeros(0, object),
    "in": {"deeper": {"text": "x"}, "empty": {}},
    "table": pd.DataFrame(
        {"gene_id": ["ENSG1", ""], "n": np.array([1, 2], np.int32)}, index=pd.Index(["A", "B"], dtype=object)
    ),
    "index_alone": pd.DataFrame(index=pd.Index(["A", "B"], dtype=object)),
    "no_genes": pd.DataFrame(index=pd.Index([], dtype=object)),
}


def _same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, pd.DataFrame):
        return isinstance(b, pd.DataFrame) and a.equals(b) and list(a.index) == list(b.index)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", VALUES)
def test_anndata_reads_what_it_would_have_written(tmp_path: Path, name: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_group(ours, "dict", "0.1.0")
    write_element(ours / name, VALUES[name])
    with quiet():
        root = zarr.open_group(theirs, mode="w")
        ad.io.write_elem(root, name, VALUES[name])
        expected = ad.io.read_elem(root[name])
        assert _same(ad.io.read_elem(zarr.open_group(ours, mode="r")[name]), expected)
    attributes = [
        {p.relative_to(folder): json.loads(p.read_text())["attributes"] for p in (folder / name).rglob("zarr.json")}
        for folder in (ours, theirs)
    ]
    assert attributes[0] == attributes[1]


def test_scalars_are_read_without_anndata_too(tmp_path: Path) -> None:
    path = tmp_path / "cells.zarr"
    simulate(path, cells=50, genes=20, batches=2, seed=0)
    files, manifest = LocalFiles(path), json.loads((path / "MANIFEST.json").read_text())
    assert read_scalar(files, "uns/scarcade/seed", manifest) == 0
    schema = json.loads(str(read_scalar(files, "uns/scarcade/schema", manifest)))
    assert schema == json.loads(json.dumps(open_store(path).schema.to_dict()))


@pytest.mark.parametrize("value", [None, [1, 2], np.array(["a", None], object), np.array([1 + 2j])])
def test_what_is_of_another_kind_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="neither a number nor a text"):
        write_element(tmp_path / "x", value)


def test_metadata_are_consolidated_as_zarr_does_it(tmp_path: Path) -> None:
    path = tmp_path / "cells.zarr"
    simulate(path, cells=200, genes=30, batches=2, labels=3, seed=0)
    ours = json.loads((path / "zarr.json").read_text())
    with quiet():
        zarr.consolidate_metadata(str(path))
    theirs = json.loads((path / "zarr.json").read_text())
    assert ours == theirs
    assert "X/indptr" in ours["consolidated_metadata"]["metadata"]


def test_a_root_alone_is_consolidated(tmp_path: Path) -> None:
    write_group(tmp_path / "a", "dict", "0.1.0")
    consolidate(tmp_path / "a")
    assert zarr.open_consolidated(str(tmp_path / "a")).attrs["encoding-type"] == "dict"


def test_a_store_is_made_without_anndata_and_zarr(tmp_path: Path) -> None:
    program = (
        "import sys; from scarcade.dataloaders.synthetic import simulate; "
        f"simulate({str(tmp_path / 'cells.zarr')!r}, cells=50, genes=20, batches=2, seed=0); "
        "print([name for name in ('anndata', 'zarr', 'dask', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with quiet():
        assert ad.read_zarr(tmp_path / "cells.zarr").shape == (50, 20)
