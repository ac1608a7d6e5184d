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


@njit(nogil=True, cache=True)
def scatter(indices: np.ndarray, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
    """Dense float32 rows (n, n_genes) of the cells whose counts begin at `starts`; `out` is overwritten."""
    for i in range(len(starts)):
        row = out[i]
        row[:] = 0.0
        for k in range(starts[i], starts[i] + lengths[i]):
            row[indices[k]] = data[k]


@njit(nogil=True, cache=True)
def gather(
    indices: np.ndarray,
    data: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    out_indices: np.ndarray,
    out_data: np.ndarray,
) -> None:
    """The cells one behind the other: CSR without its row pointers."""
    at = 0
    for i in range(len(starts)):
        start = starts[i]
        for k in range(lengths[i]):
            out_indices[at + k] = indices[start + k]
            out_data[at + k] = data[start + k]
        at += lengths[i]


@njit(nogil=True, cache=True)
def place(
    row_lengths: np.ndarray, first: int, begins: int, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray
) -> None:
    """Where the counts of consecutive cells stand: the first is row `first`, its counts begin at `begins`."""
    at = begins
    for i in range(len(row_lengths)):
        starts[i] = at
        lengths[i] = row_lengths[i]
        rows[i] = first + i
        at += row_lengths[i]
