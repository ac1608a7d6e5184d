"""A matrix of cells x genes as it lies in a file, read by blocks of checked cells.

Blocks are checked (`counts`) before anything indexes with them; memory does not depend on the number of cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scarcade.dataloaders.counts import Csr, Place, check_indptr, checked, dense_to_csr
from scarcade.dataloaders.reading import piece
from scarcade.engine.errors import CsrError

BLOCK = 1 << 22  # values of a block: 16 MB of indices, 16 to 32 MB of values
_POINTERS = 1 << 16  # cells whose row pointers are read at once


@dataclass(frozen=True)
class Matrix:
    """One matrix of cells x genes as it lies in a file; `indices` and `indptr` only where it is sparse."""

    where: str
    layout: str  # "dense", "csr" or "csc"
    shape: tuple[int, int]
    data: Any
    indices: Any = None
    indptr: Any = None

    @property
    def n_stored(self) -> int:
        return int(np.prod(self.shape)) if self.layout == "dense" else int(self.data.shape[0])


def blocks(
    matrix: Matrix, place: Place, *, integer: bool = True, size: int = BLOCK, workspace: Path | None = None
) -> Iterator[tuple[int, Csr]]:
    """Every cell of `matrix` in order, as (first cell, checked counts) of at most about `size` values each.

    CSC is turned into rows through files in `workspace` (a temporary folder if None is given).

    Raises:
        CsrError, CountsError: as `counts.checked`. OpenError: the file's bytes cannot be decoded.
    """
    if matrix.layout == "dense":
        yield from _dense_blocks(matrix, place, integer, size)
    elif matrix.layout == "csr":
        yield from _csr_blocks(matrix, place, integer, size)
    else:
        from scarcade.dataloaders.transpose import csc_blocks

        yield from csc_blocks(matrix, place, integer, size, workspace)


def _dense_blocks(matrix: Matrix, place: Place, integer: bool, size: int) -> Iterator[tuple[int, Csr]]:
    n_cells, n_genes = matrix.shape
    step = max(1, size // max(n_genes, 1))
    chunks = getattr(matrix.data, "chunks", None)
    if chunks and step > chunks[0]:
        step -= step % chunks[0]
    for first in range(0, n_cells, step):
        values = piece(matrix.data, first, min(first + step, n_cells), matrix.where)
        yield first, dense_to_csr(values, _at(place, first), integer=integer)


def _csr_blocks(matrix: Matrix, place: Place, integer: bool, size: int) -> Iterator[tuple[int, Csr]]:
    n_cells, n_genes = matrix.shape
    check_parts(matrix, n_cells)
    for start in range(0, n_cells, _POINTERS):
        stop = min(start + _POINTERS, n_cells)
        raw = piece(matrix.indptr, start, stop + 1, f"{matrix.where}: indptr")
        pointers = check_indptr(raw, matrix.n_stored, n_genes, _at(place, start))
        first = start
        while first < stop:
            begin = pointers[first - start]
            last = start + int(np.searchsorted(pointers, begin + size, side="right")) - 1
            last = min(max(last, first + 1), stop)
            end = pointers[last - start]
            indices = piece(matrix.indices, begin, end, f"{matrix.where}: indices")
            data = piece(matrix.data, begin, end, f"{matrix.where}: data")
            own = pointers[first - start : last - start + 1] - begin
            yield first, checked(own, indices, data, n_genes, _at(place, first), integer=integer)
            first = last


def check_parts(matrix: Matrix, n_major: int) -> None:
    """The lengths of a sparse matrix's three arrays and the ends of its pointers.

    Raises:
        CsrError: they do not agree.
    """
    for name, part in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
        if not hasattr(part, "shape") or len(part.shape) != 1:
            raise CsrError(f"{matrix.where}: {name} is not a list of numbers")
    if matrix.data.shape != matrix.indices.shape:
        raise CsrError(f"{matrix.where}: {matrix.data.shape[0]} values but {matrix.indices.shape[0]} indices")
    if matrix.indptr.shape[0] != n_major + 1:
        raise CsrError(
            f"{matrix.where}: indptr has {matrix.indptr.shape[0]} entries; "
            f"wanted {n_major + 1} for shape {matrix.shape}"
        )
    ends = [int(piece(matrix.indptr, at, at + 1, f"{matrix.where}: indptr")[0]) for at in (0, n_major)]
    if ends != [0, matrix.n_stored]:
        raise CsrError(f"{matrix.where}: indptr runs from {ends[0]} to {ends[1]}; wanted 0 to {matrix.n_stored}")


def _at(place: Place, first: int) -> Place:
    return Place(place.where, place.cells, place.genes, first)
