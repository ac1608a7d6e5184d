"""Whether the rows of a CSR matrix are what compiled code without bounds checks may trust."""

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
        columns = indices[indptr[row] : indptr[row + 1]]
        n = len(columns)
        falls = 0
        for k in range(1, n):  # without a way out, so that it is done in vectors
            falls += columns[np.uintp(k)] <= columns[np.uintp(k - 1)]
        if falls == 0 and (n == 0 or (columns[0] >= 0 and columns[n - 1] < n_genes)):
            continue
        before = np.int64(-1)
        for k in range(indptr[row], indptr[row + 1]):
            column = np.int64(indices[k])
            if column < 0 or column >= n_genes:
                return BAD_COLUMN, row
            if column <= before:
                return BAD_ORDER, row
            before = column
    return OK, -1
