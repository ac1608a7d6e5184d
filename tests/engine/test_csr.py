"""The check that compiled code relies on."""

import numpy as np
import pytest

from scarcade.engine import csr


@pytest.mark.parametrize(
    ("indptr", "indices", "expected"),
    [
        ([0, 2, 3], [0, 4, 1], (csr.OK, -1)),
        ([0, 0, 0], [], (csr.OK, -1)),
        ([0], [], (csr.OK, -1)),
        ([], [], (csr.BAD_INDPTR, 0)),
        ([1, 2, 3], [0, 1, 2], (csr.BAD_INDPTR, 0)),
        ([0, 2, 4], [0, 1, 2], (csr.BAD_INDPTR, 0)),
        ([0, 3, 2, 3], [0, 1, 2], (csr.BAD_INDPTR, 1)),
        ([0, 1 << 40, 3], [0, 1, 2], (csr.BAD_INDPTR, 0)),
        ([0, -1, 3], [0, 1, 2], (csr.BAD_INDPTR, 0)),
        ([0, 2, 3], [0, 5, 1], (csr.BAD_COLUMN, 0)),
        ([0, 2, 3], [0, 1, -1], (csr.BAD_COLUMN, 1)),
        ([0, 2, 3], [1, 1, 2], (csr.BAD_ORDER, 0)),
        ([0, 1, 3], [1, 3, 2], (csr.BAD_ORDER, 1)),
    ],
)
def test_check_rows(indptr: list[int], indices: list[int], expected: tuple[int, int]) -> None:
    assert csr.check_rows(np.array(indptr, np.int64), np.array(indices, np.int64), 5) == expected


def test_check_rows_of_unsigned_columns() -> None:
    columns = np.array([0, 2**64 - 1], np.uint64)
    assert csr.check_rows(np.array([0, 2]), columns, 5)[0] == csr.BAD_COLUMN
