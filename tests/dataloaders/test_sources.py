from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from scarcade.dataloaders import writer
from scarcade.dataloaders.sources import Columns, MemorySource, StoreSource
from scarcade.engine.errors import CategoryError, CsrError
from scarcade.engine.schema import Categories, Schema
from tests.dataloaders.made import made_cells, make

SCHEMA = Schema(tuple(f"g{i}" for i in range(20)), Categories("batch", ("a", "b")))
BATCH = np.array([0, 1, 0, 1, 1], np.int8)


def source(counts: Any, keys: np.ndarray | None = None) -> MemorySource:
    return MemorySource(counts, Columns(BATCH), SCHEMA, keys, 0)


@pytest.mark.parametrize("chunk", [1 << 16, 100, 7])
def test_runs_of_a_store(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "COUNTS_PER_CHUNK", chunk)  # 7: a cell reaches over several chunks
    made = make(tmp_path / "s.zarr")
    ours = StoreSource(made.store)
    runs = [(100, 300), (2900, 3000), (0, 7), (50, 50)]
    order = np.random.default_rng(0).permutation(307)
    loaded = ours.load(runs, order)
    rows = np.concatenate([np.arange(a, b) for a, b in runs])
    both = ours.proteins(loaded, runs)
    assert both is not None
    assert np.array_equal(both[0], made.proteins[rows])
    rows = rows[order]
    assert np.array_equal(loaded.rows, rows)
    for k in range(307):
        counts = slice(loaded.starts[k], loaded.starts[k] + loaded.lengths[k])
        row = made.counts[rows[k]]
        assert np.array_equal(loaded.indices[counts], row.indices)
        assert np.array_equal(loaded.data[counts], row.data)


@pytest.mark.parametrize("form", ["csr", "csc", "array", "triple", "unsorted", "csr_array"])
def test_counts_in_memory_may_come_in_any_form(form: str) -> None:
    counts = made_cells(5, 20, density=0.3)
    shuffled = counts.copy()
    shuffled.indices[:2] = shuffled.indices[:2][::-1].copy()
    shuffled.data[:2] = shuffled.data[:2][::-1].copy()
    shuffled.has_sorted_indices = False
    forms: dict[str, Any] = {
        "csr": counts,
        "csc": counts.tocsc(),
        "array": counts.toarray(),
        "triple": (counts.indptr, counts.indices, counts.data),
        "unsorted": shuffled,
        "csr_array": sp.csr_array(counts),
    }
    ours = source(forms[form], np.array([5, 4, 3, 2, 1], np.uint64))
    loaded = ours.load([(0, 2)], np.array([0, 1]))
    assert loaded.rows.tolist() == [4, 3]
    got = ours.data[loaded.starts[0] : loaded.starts[0] + loaded.lengths[0]]
    assert np.array_equal(got, counts[4].data)


@pytest.mark.parametrize(
    "triple",
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 20], [1] * 5),
        ([0, 1, 2, 3, 4, 5], [0, 1, -2, 3, 4], [1] * 5),
        ([0, 1, 2, 3, 4, 9], [0, 1, 2, 3, 4], [1] * 5),
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [1] * 3),
        ([0, 2, 1, 3, 4, 5], [0, 1, 2, 3, 4], [1] * 5),
    ],
)
def test_structure_that_would_read_out_of_bounds_is_refused(triple: tuple[list[int], list[int], list[int]]) -> None:
    with pytest.raises(CsrError):
        source(tuple(np.array(part) for part in triple))


def test_the_fingerprint_follows_the_cells() -> None:
    counts = made_cells(5, 20, density=0.3)
    one = source(counts).fingerprint
    assert source(counts.copy()).fingerprint == one
    changed = counts.copy()
    changed.data[3] += 1
    assert source(changed).fingerprint != one
    assert MemorySource(counts, Columns(BATCH[::-1]), SCHEMA, None, 0).fingerprint != one
    assert source(counts, np.arange(5, dtype=np.uint64)[::-1]).fingerprint != one


def test_codes_and_numbers_are_checked() -> None:
    counts = made_cells(5, 20)
    schema = replace(
        SCHEMA, labels=(Categories("type", ("x",)),), categorical=(Categories("sex", ("f",)),), continuous=("age",)
    )
    good = Columns(BATCH, np.array([0, -1, 0, 0, -1]), (np.zeros(5, int),), (np.zeros(5, np.float32),), np.ones(5))
    MemorySource(counts, good, schema, None, 0)
    nan = np.array([0, 1, np.nan, 0, 0], np.float32)
    for wrong, says in (
        (replace(good, batch=BATCH + 1), "'batch'"),
        (replace(good, batch=BATCH - 1), "'batch'"),
        (replace(good, batch=BATCH[:4]), "'batch'"),
        (replace(good, labels=np.full(5, 1)), "'type'"),
        (replace(good, labels=np.full(5, -2)), "'type'"),
        (replace(good, categorical=(np.full(5, -1),)), "'sex'"),
        (replace(good, categorical=()), "0 categorical covariates"),
        (replace(good, continuous=()), "0 continuous covariates"),
        (replace(good, continuous=(nan,)), "'age'"),
        (replace(good, size_factor=nan), "size factor"),
    ):
        with pytest.raises(CategoryError, match=says):
            MemorySource(counts, wrong, schema, None, 0)
    with pytest.raises(CsrError, match="4 keys for 5 cells"):
        source(counts, np.arange(4, dtype=np.uint64))
