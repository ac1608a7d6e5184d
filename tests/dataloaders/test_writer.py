from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scarcade.dataloaders.store import CellBlock, StoreWriter, open_store
from scarcade.dataloaders.writer import smallest_codes
from scarcade.engine.errors import (
    CategoryError,
    CountsError,
    CsrError,
    GenesError,
    InputError,
    LimitError,
    ScarcadeError,
    StorageError,
)
from scarcade.engine.schema import Categories, Schema

GENES = ("g0", "g1", "g2")
SCHEMA = Schema(GENES, Categories("batch", ("a", "b")))
BLOCK = CellBlock(
    np.array([0, 2, 3]),
    np.array([0, 2, 1], np.uint16),
    np.array([5, 6, 7], np.uint16),
    np.array([10, 20], np.uint64),
    pd.DataFrame({"batch": pd.Categorical(["a", "b"])}, index=["c0", "c1"]),
)


def writer(path: Path, **changes: Any) -> StoreWriter:
    options: Mapping[str, Any] = {
        "schema": SCHEMA,
        "var": pd.DataFrame(index=list(GENES)),
        "index_dtype": np.uint16,
        "value_dtype": np.uint8,
        "seed": 0,
        "sources": [],
    }
    return StoreWriter(path, **{**options, **changes})


def test_a_block_is_written(tmp_path: Path) -> None:
    with writer(tmp_path / "s.zarr") as out:
        out.append(BLOCK)
        assert not (tmp_path / "s.zarr").exists()
    store = open_store(tmp_path / "s.zarr")
    assert store.read(0, 2)[2].tolist() == [5, 6, 7]
    assert store.read(0, 2)[2].dtype == np.uint8
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"indices": np.array([0, 3, 1], np.uint16)}, CsrError, "'c0' has a column outside of 0 .. 2"),
        ({"indices": np.array([0, -1, 1], np.int64)}, CsrError, "'c0' has a column outside"),
        ({"indices": np.array([2, 0, 1], np.uint16)}, CsrError, "'c0' has columns that are not strictly ascending"),
        ({"indices": np.array([0, 0, 1], np.uint16)}, CsrError, "not strictly ascending"),
        ({"indptr": np.array([0, 4, 3])}, CsrError, "row pointers"),
        ({"indptr": np.array([0, 2, 9])}, CsrError, "row pointers"),
        ({"indptr": np.array([0, 3])}, CsrError, "2 row pointers"),
        ({"data": np.array([5, 6], np.uint16)}, CsrError, "3 columns and 2 values"),
        ({"data": np.array([5, 6, 256], np.uint16)}, CountsError, "counts up to 256"),
        ({"data": np.array([5, 6, 0.5], np.float32)}, CountsError, "do not fit"),
        ({"data": np.array([5, 6, -1], np.int32)}, CountsError, "do not fit"),
        ({"keys": np.array([20, 10], np.uint64)}, InputError, "order of their keys"),
        ({"obs": pd.DataFrame({"x": [1, 2]})}, CategoryError, "names the obs column 'batch'"),
        ({"obs": BLOCK.obs.iloc[:1]}, CsrError, "1 rows of obs"),
        (
            {"obs": BLOCK.obs.assign(n=pd.Series(["a", None], ["c0", "c1"], dtype=object))},
            CategoryError,
            "'n': None among strings",
        ),
        ({"obs": BLOCK.obs.assign(**{"a/b": 1})}, CategoryError, "not a name that can be stored"),
        ({"obs": BLOCK.obs.assign(**{"..": 1})}, CategoryError, "not a name that can be stored"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(
    tmp_path: Path, change: dict[str, Any], error: type[ScarcadeError], says: str
) -> None:
    with pytest.raises(error, match=says), writer(tmp_path / "s.zarr") as out:
        out.append(replace(BLOCK, **change))
    assert list(tmp_path.iterdir()) == []


def test_blocks_must_agree(tmp_path: Path) -> None:
    later = replace(BLOCK, keys=BLOCK.keys + np.uint64(100))
    for obs, says in (
        (BLOCK.obs.assign(more=1), "columns of obs change"),
        (pd.DataFrame({"batch": pd.Categorical(["a", "c"])}), "categories change"),
        (pd.DataFrame({"batch": ["a", "b"]}), "categories change"),
    ):
        with pytest.raises(CategoryError, match=says), writer(tmp_path / "s.zarr") as out:
            out.append(BLOCK)
            out.append(replace(later, obs=obs))
    with pytest.raises(InputError, match="order of their keys"), writer(tmp_path / "s.zarr") as out:
        out.append(later)
        out.append(BLOCK)


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no cells"), writer(tmp_path / "s.zarr"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writer(tmp_path / "s.zarr") as out:
        out.append(BLOCK)
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_older_store_is_kept_or_replaced(tmp_path: Path) -> None:
    for replaced in (False, True, True):
        with writer(tmp_path / "s.zarr", replace=replaced, seed=int(replaced)) as out:
            out.append(BLOCK)
    assert open_store(tmp_path / "s.zarr").seed == 1
    with pytest.raises(StorageError, match="exists already"), writer(tmp_path / "s.zarr"):
        pass
    with pytest.raises(KeyError), writer(tmp_path / "s.zarr", replace=True):
        raise KeyError
    assert open_store(tmp_path / "s.zarr").verify() == []


def test_genes_and_types_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(GenesError, match="index of var"):
        writer(tmp_path / "s.zarr", var=pd.DataFrame(index=["g0", "g2", "g1"]))
    many = tuple(f"g{i}" for i in range(300))
    with pytest.raises(LimitError, match="300 genes do not fit into uint8"):
        writer(
            tmp_path / "s.zarr",
            schema=replace(SCHEMA, genes=many),
            var=pd.DataFrame(index=list(many)),
            index_dtype=np.uint8,
        )


def test_proteins_must_be_there(tmp_path: Path) -> None:
    schema = replace(SCHEMA, proteins=("p",))
    with pytest.raises(CountsError, match="counts of 1 proteins"), writer(tmp_path / "s.zarr", schema=schema) as out:
        out.append(BLOCK)
    with writer(tmp_path / "s.zarr", schema=schema) as out:
        out.append(replace(BLOCK, proteins=np.ones((2, 1), np.float32)))
    both = open_store(tmp_path / "s.zarr").proteins(0, 2)
    assert both is not None
    assert both[1].all()


def test_smallest_codes() -> None:
    assert [smallest_codes(n) for n in (1, 128, 129, 1 << 15, (1 << 15) + 1)] == [
        np.dtype(t) for t in ("int8", "int8", "int16", "int16", "int32")
    ]
