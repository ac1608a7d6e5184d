import numpy as np
import pytest
import scipy.sparse as sp

from scarcade.dataloaders import kernels


@pytest.mark.parametrize(
    ("index", "value"), [("uint16", "uint16"), ("uint16", "uint8"), ("uint32", "float32"), ("int32", "float32")]
)
def test_scatter_and_gather(index: str, value: str) -> None:
    counts = sp.random(30, 40, density=0.3, format="csr", random_state=0)
    counts.data = np.arange(1, len(counts.data) + 1) % 200 + 1.0
    rows = np.array([3, 3, 29, 0, 17])
    indices, data = counts.indices.astype(index), counts.data.astype(value)
    starts, lengths = counts.indptr[rows].astype(np.int64), np.diff(counts.indptr)[rows].astype(np.int32)
    out = np.full((5, 40), np.nan, np.float32)
    kernels.scatter(indices, data, starts, lengths, out)
    assert np.array_equal(out, counts[rows].toarray())
    got_indices, got_data = np.empty(lengths.sum(), index), np.empty(lengths.sum(), value)
    kernels.gather(indices, data, starts, lengths, got_indices, got_data)
    assert np.array_equal(got_indices, counts[rows].indices)
    assert np.array_equal(got_data, counts[rows].data)


@pytest.mark.parametrize(
    ("indptr", "indices", "expected"),
    [
        ([0, 2, 3], [0, 4, 1], (kernels.OK, -1)),
        ([0, 0, 0], [], (kernels.OK, -1)),
        ([0], [], (kernels.OK, -1)),
        ([], [], (kernels.BAD_INDPTR, 0)),
        ([1, 2, 3], [0, 1, 2], (kernels.BAD_INDPTR, 0)),
        ([0, 2, 4], [0, 1, 2], (kernels.BAD_INDPTR, 0)),
        ([0, 3, 2, 3], [0, 1, 2], (kernels.BAD_INDPTR, 1)),
        ([0, 1 << 40, 3], [0, 1, 2], (kernels.BAD_INDPTR, 0)),
        ([0, -1, 3], [0, 1, 2], (kernels.BAD_INDPTR, 0)),
        ([0, 2, 3], [0, 5, 1], (kernels.BAD_COLUMN, 0)),
        ([0, 2, 3], [0, 1, -1], (kernels.BAD_COLUMN, 1)),
        ([0, 2, 3], [1, 1, 2], (kernels.BAD_ORDER, 0)),
        ([0, 1, 3], [1, 3, 2], (kernels.BAD_ORDER, 1)),
    ],
)
def test_check_rows(indptr: list[int], indices: list[int], expected: tuple[int, int]) -> None:
    assert kernels.check_rows(np.array(indptr, np.int64), np.array(indices, np.int64), 5) == expected


def test_check_rows_of_unsigned_columns() -> None:
    columns = np.array([0, 2**64 - 1], np.uint64)
    assert kernels.check_rows(np.array([0, 2]), columns, 5)[0] == kernels.BAD_COLUMN


def test_place() -> None:
    starts, lengths, rows = np.empty(3, np.int64), np.empty(3, np.int32), np.empty(3, np.int64)
    kernels.place(np.array([2, 0, 5], np.uint16), 10, 100, starts, lengths, rows)
    assert starts.tolist() == [100, 102, 102]
    assert lengths.tolist() == [2, 0, 5]
    assert rows.tolist() == [10, 11, 12]
