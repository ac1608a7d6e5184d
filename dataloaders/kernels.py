"""Compiled loops over CSR rows: check, gather, scatter, shuffle. None of them holds the interpreter lock.

They index without bounds checks, so whoever calls them has checked first: `check_rows` for what comes from
outside, the column maximum of every decoded chunk for what comes from a store.
"""

import numpy as np
from numba import njit

OK, BAD_INDPTR, BAD_COLUMN, BAD_ORDER = 0, 1, 2, 3


@njit(nogil=True, cache=True)
def check_rows(indptr: np.ndarray, indices: np.ndarray, n_genes: int) -> tuple[int, int]:
    """(what is wrong, in which row) of the first row that is not strictly ascending below `n_genes`."""
    if len(indptr) == 0 or indptr[0] != 0 or indptr[-1] != len(indices):
        return BAD_INDPTR, 0
    for row in range(len(indptr) - 1):
        if indptr[row + 1] < indptr[row] or indptr[row + 1] > len(indices):
            return BAD_INDPTR, row
        before = np.int64(-1)
        for k in range(indptr[row], indptr[row + 1]):
            column = np.int64(indices[k])
            if column < 0 or column >= n_genes:
                return BAD_COLUMN, row
            if column <= before:
                return BAD_ORDER, row
            before = column
    return OK, -1
