"""CSC read by rows in bounded memory: one pass deals the values out to files of neighbouring cells.

A column-wise matrix holds the genes of one cell in as many places as there are genes. Reading it row by row would
decode the file once for each block. Instead the values are dealt out in file order to files that each hold a
range of cells small enough for memory; each file is then sorted by a counting sort and handed on.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numba
import numpy as np

from scarcade.dataloaders.counts import Csr, Place, check_indptr, checked
from scarcade.dataloaders.matrix import Matrix, check_parts
from scarcade.dataloaders.reading import piece
from scarcade.engine.errors import CsrError

_MAX_FILES = 256


def csc_blocks(
    matrix: Matrix, place: Place, integer: bool, size: int, workspace: Path | None
) -> Iterator[tuple[int, Csr]]:
    """The cells of a CSC matrix in order, as `matrix.blocks`; memory is about 8 bytes a cell plus one file's values.

    Raises:
        CsrError, CountsError, OpenError: as `matrix.blocks`.
    """
    n_cells, n_genes = matrix.shape
    check_parts(matrix, n_genes)
    pointers = piece(matrix.indptr, 0, n_genes + 1, f"{matrix.where}: indptr")
    pointers = check_indptr(pointers, matrix.n_stored, n_cells, Place(place.where))
    lengths = _row_lengths(matrix, size)
    indptr = np.zeros(n_cells + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    share = max(size, -(-matrix.n_stored // _MAX_FILES))
    bounds = [0]
    while bounds[-1] < n_cells:
        last = int(np.searchsorted(indptr, indptr[bounds[-1]] + share, side="right")) - 1
        bounds.append(min(max(last, bounds[-1] + 1), n_cells))
    with tempfile.TemporaryDirectory(prefix="transpose-", dir=workspace) as folder:
        dtype = _deal(matrix, pointers, np.array(bounds), size, Path(folder))
        for part, (first, stop) in enumerate(pairwise(bounds)):
            records = np.fromfile(Path(folder) / str(part), dtype)
            own = indptr[first : stop + 1] - indptr[first]
            indices = np.empty(len(records), np.int32)
            data = np.empty(len(records), dtype["value"])
            _place(own, records["cell"] - first, records["gene"], records["value"], indices, data)
            here = Place(place.where, place.cells, place.genes, first)
            yield first, checked(own, indices, data, n_genes, here, integer=integer)


def _row_lengths(matrix: Matrix, size: int) -> np.ndarray:
    n_cells = matrix.shape[0]
    lengths = np.zeros(n_cells, np.int64)
    for start in range(0, matrix.n_stored, size):
        cells = _cells(matrix, start, min(start + size, matrix.n_stored))
        np.add(lengths, np.bincount(cells, minlength=n_cells), out=lengths)
    return lengths


def _cells(matrix: Matrix, start: int, stop: int) -> np.ndarray:
    cells = piece(matrix.indices, start, stop, f"{matrix.where}: indices")
    if cells.dtype.kind not in "iu":
        raise CsrError(f"{matrix.where}: cell indices are {cells.dtype}; wanted integers")
    if len(cells) and (cells.min() < 0 or cells.max() >= matrix.shape[0]):
        bad = cells[(cells < 0) | (cells >= matrix.shape[0])]
        shown = ", ".join(map(str, bad[:10]))
        raise CsrError(f"{matrix.where}: cell indices lie outside of 0..{matrix.shape[0] - 1}: {shown}")
    return cells.astype(np.int64, copy=False)


def _deal(matrix: Matrix, pointers: np.ndarray, bounds: np.ndarray, size: int, folder: Path) -> np.dtype:
    """Write each value as (cell, gene, value) to the file of its cell's range; the records' type."""
    dtype = np.dtype([("cell", np.int64), ("gene", np.int32), ("value", matrix.data.dtype)])
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / str(part), "wb")) for part in range(len(bounds) - 1)]
        for start in range(0, matrix.n_stored, size):
            stop = min(start + size, matrix.n_stored)
            records = np.empty(stop - start, dtype)
            records["cell"] = _cells(matrix, start, stop)
            genes = np.searchsorted(pointers, np.arange(start, stop), side="right") - 1
            records["gene"] = genes
            records["value"] = piece(matrix.data, start, stop, f"{matrix.where}: data")
            parts = np.searchsorted(bounds, records["cell"], side="right") - 1
            order = np.argsort(parts, kind="stable")
            cuts = np.searchsorted(parts[order], np.arange(len(files) + 1))
            for part, file in enumerate(files):
                if cuts[part] < cuts[part + 1]:
                    records[order[cuts[part] : cuts[part + 1]]].tofile(file)
    return dtype


@numba.njit(cache=True, nogil=True)
def _place(
    indptr: np.ndarray, rows: np.ndarray, genes: np.ndarray, values: np.ndarray, indices: np.ndarray, data: np.ndarray
) -> None:
    """Counting sort by row; genes came in ascending order and stay so."""
    at = indptr[:-1].copy()
    for i in range(len(rows)):
        row = rows[i]
        indices[at[row]] = genes[i]
        data[at[row]] = values[i]
        at[row] += 1
