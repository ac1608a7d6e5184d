"""Checks on counts and on CSR structure, on every value, before any compiled code indexes with them.

A column index out of range makes scipy and numba read outside of their arrays: the process dies, and with it a
worker. scvi-tools looks at 20 random values; a file with one bad value in a thousand passes. Here each value is
looked at once, at memory speed, and what is wrong is named by cell and gene.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np

from scarcade.dataloaders.reused import empty
from scarcade.engine import csr
from scarcade.engine.errors import CountsError, CsrError

MAX_COUNT = 2**32 - 1  # the largest count that a store holds
_SHOWN = 10  # coordinates in a message


class Csr(NamedTuple):
    """Checked counts of n cells: within a row the gene indices ascend strictly."""

    indptr: np.ndarray  # int64 (n + 1,), from 0
    indices: np.ndarray  # int32
    data: np.ndarray  # uint32, or float32 where whole numbers were not asked for

    @property
    def n_cells(self) -> int:
        return len(self.indptr) - 1


@dataclass(frozen=True)
class Place:
    """Where a block of values stands, so that a message can name cells and genes."""

    where: str  # the file and the layer
    cells: Sequence[Any] | np.ndarray | None = None  # names of all cells of the file
    genes: Sequence[Any] | np.ndarray | None = None
    first: int = 0  # the block's first cell
    of: str = "gene"  # what a column is

    def at(self, row: int, column: int, value: Any) -> str:
        cell = self.first + row
        who = f"cell {cell}" if self.cells is None or cell >= len(self.cells) else f"cell {self.cells[cell]!r}"
        known = self.genes is not None and 0 <= column < len(self.genes)
        name = f"{self.of} {self.genes[column]!r}" if known and self.genes is not None else f"{self.of} index {column}"
        return f"({who}, {name}, {value})"


def _listed(place: Place, csr: tuple[np.ndarray, np.ndarray, np.ndarray], bad: np.ndarray) -> str:
    """The first coordinates of the elements `bad` (places in `indices`), and how many there are in all."""
    indptr, indices, data = csr
    rows = np.searchsorted(indptr, bad[:_SHOWN], side="right") - 1
    shown = ", ".join(place.at(int(r), int(indices[p]), data[p]) for r, p in zip(rows, bad[:_SHOWN], strict=True))
    return shown + (f" and {len(bad) - _SHOWN} more in this block" if len(bad) > _SHOWN else "")


def check_indptr(indptr: np.ndarray, n_stored: int, n_genes: int, place: Place) -> np.ndarray:
    """Row pointers as int64, if they ascend, lie within the stored values and no row is longer than the genes.

    `indptr` may be a part of a file's pointers (its first then need not be 0).

    Raises:
        CsrError: with the first cell at which it goes wrong.
    """
    if indptr.ndim != 1 or len(indptr) == 0 or indptr.dtype.kind not in "iu":
        raise CsrError(f"{place.where}: indptr is {indptr.dtype} of shape {indptr.shape}; wanted one axis of integers")
    if indptr.dtype == np.uint64 and indptr.max() > np.iinfo(np.int64).max:
        raise CsrError(f"{place.where}: indptr points beyond the {n_stored} stored values")
    pointers = indptr.astype(np.int64, copy=False)
    if pointers[0] < 0 or pointers.max() > n_stored:
        at = int(np.flatnonzero((pointers < 0) | (pointers > n_stored))[0])
        raise CsrError(
            f"{place.where}: indptr of cell {place.first + at} is {pointers[at]}, "
            f"outside of the {n_stored} stored values"
        )
    lengths = np.diff(pointers)
    wrong = np.flatnonzero((lengths < 0) | (lengths > n_genes))
    if len(wrong):
        raise CsrError(
            f"{place.where}: indptr gives cell {place.first + int(wrong[0])} {lengths[wrong[0]]} values "
            f"of {n_genes} genes ({len(wrong)} cells in this block are like that)"
        )
    return pointers


def check_csr(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_genes: int, place: Place
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The structure of a block (indptr from 0), with rows that were not sorted sorted: (indptr, int32 indices, data).

    Raises:
        CsrError: pointers or gene indices out of range, or a gene twice in a cell; with the first ten places.
    """
    indptr = check_indptr(indptr, len(indices), n_genes, place)
    if indptr[0] != 0 or indptr[-1] != len(indices) or data.shape != indices.shape or indices.ndim != 1:
        raise CsrError(
            f"{place.where}: indptr ends at {indptr[-1]}, but there are {len(indices)} gene indices "
            f"and {len(data)} values; the three must agree"
        )
    if indices.dtype.kind not in "iu":
        raise CsrError(f"{place.where}: gene indices are {indices.dtype}; wanted integers")
    if csr.check_rows(indptr, indices, n_genes)[0] == csr.OK:
        return indptr, indices.astype(np.int32, copy=False), data
    if len(indices) and (indices.min() < 0 or indices.max() >= n_genes):
        bad = np.flatnonzero((indices < 0) | (indices >= n_genes))
        raise CsrError(
            f"{place.where}: {len(bad)} gene indices lie outside of 0..{n_genes - 1}: "
            + _listed(place, (indptr, indices, data), bad)
        )
    indices, data = indices.astype(np.int32), np.array(data, copy=True)
    repeated = np.zeros(_SHOWN, np.int64)
    if n := _sort_rows(indptr, indices, data, n_genes, repeated):
        raise CsrError(
            f"{place.where}: {n} times a gene stands more than once in a cell; sum duplicates first "
            "(scipy: matrix.sum_duplicates()): " + _listed(place, (indptr, indices, data), repeated[:n])
        )
    return indptr, indices, data


def check_counts(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, place: Place, *, integer: bool = True
) -> np.ndarray:
    """The values as uint32 if each is a whole number from 0 to 2^32 - 1; with `integer=False` finite float32.

    Raises:
        CountsError: NaN, infinite, negative, fractional or too large values; the first ten by (cell, gene, value).
    """
    if data.dtype.kind not in "iufb":
        raise CountsError(f"{place.where}: values are {data.dtype}; wanted numbers")
    if not integer:
        with np.errstate(over="ignore"):
            real = data.astype(np.float32, copy=False)
        good = np.isfinite(real)
        if not good.all():
            found = _listed(place, (indptr, indices, data), np.flatnonzero(~good))
            raise CountsError(f"{place.where}: {int((~good).sum())} values are not finite: {found}")
        return real
    if data.dtype.kind in "iub":
        if len(data) == 0 or (data.min() >= 0 and data.max() <= MAX_COUNT):
            return data.astype(np.uint32, copy=False)
        bad = np.flatnonzero((data < 0) | (data > MAX_COUNT))
    else:
        wide = data.astype(np.float32) if data.dtype.itemsize < 4 else data
        counts = empty(len(wide), np.uint32)
        if _whole(wide.astype(np.float64) if wide.dtype.itemsize > 8 else wide, counts):
            return counts
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~((wide >= 0) & (wide <= MAX_COUNT) & (wide == np.floor(wide))))
    wrong = data[bad].astype(np.float64)
    what = "not counts (whole numbers from 0 on)"
    if (np.isfinite(wrong) & (wrong > MAX_COUNT) & (wrong == np.floor(wrong))).all():
        what = f"larger than {MAX_COUNT:,}, the largest count that a store holds"
    raise CountsError(f"{place.where}: {len(bad)} values are {what}: " + _listed(place, (indptr, indices, data), bad))


def checked(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_genes: int, place: Place, *, integer: bool = True
) -> Csr:
    """`check_csr` and `check_counts` of one block: the only way in which foreign counts enter."""
    indptr, indices, data = check_csr(indptr, indices, data, n_genes, place)
    return Csr(indptr, indices, check_counts(indptr, indices, data, place, integer=integer))


def dense_to_csr(values: np.ndarray, place: Place, *, integer: bool = True) -> Csr:
    """Checked counts of a dense (cells, genes) block.

    Raises:
        CountsError: as `check_counts`.
    """
    if values.dtype.kind not in "iufb":
        raise CountsError(f"{place.where}: values are {values.dtype}; wanted numbers")
    rows, columns = np.nonzero(values)  # NaN is not zero, so it is seen
    indptr = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(values)), out=indptr[1:])
    indices = columns.astype(np.int32)
    return Csr(indptr, indices, check_counts(indptr, indices, values[rows, columns], place, integer=integer))


def take_rows(
    csr: Csr,
    order: np.ndarray,
    columns: np.ndarray,
    n_out: int,
    *,
    index_dtype: Any = np.int32,
    value_dtype: Any = None,
) -> Csr:
    """The rows `order` with gene g renamed to ``columns[g]`` (-1: left out); zeros that were stored are dropped.

    The result's rows ascend whatever the order of `columns` is. Arrays are freshly made, of types that must hold what
    is put into them (`value_dtype`: that of `csr`).
    """
    indptr = np.zeros(len(order) + 1, np.int64)
    order = np.ascontiguousarray(order, dtype=np.int64)
    columns = np.ascontiguousarray(columns, dtype=np.int32)
    all_kept = bool((columns >= 0).all())
    same = all_kept and np.array_equal(columns, np.arange(len(columns)))
    most = int((csr.indptr[order + 1] - csr.indptr[order]).sum()) + 1  # one is written before it is known to be dropped
    indices, data = empty(most, index_dtype), empty(most, value_dtype or csr.data.dtype)
    _take(csr.indptr, csr.indices, csr.data, order, columns, all_kept, same, indptr, indices, data)
    indices, data = indices[: indptr[-1]], data[: indptr[-1]]
    if not (np.diff(columns[columns >= 0]) > 0).all():
        _sort_rows(indptr, indices, data, n_out, np.zeros(_SHOWN, np.int64))
    return Csr(indptr, indices, data)


def raise_to(largest: np.ndarray, csr: Csr) -> None:
    """Raise the largest value of each gene where `csr` has a larger one: `np.maximum.at`, which is far slower."""
    here = np.zeros(len(largest), csr.data.dtype)
    _raise(csr.indices, csr.data, here)
    np.maximum(largest, here, out=largest)


@numba.njit(cache=True, nogil=True)
def _raise(indices: np.ndarray, data: np.ndarray, largest: np.ndarray) -> None:
    for i in range(len(indices)):
        gene = np.uintp(indices[np.uintp(i)])
        largest[gene] = max(largest[gene], data[np.uintp(i)])


@numba.njit(cache=True, nogil=True)
def _whole(values: np.ndarray, out: np.ndarray) -> bool:
    """Whether all are whole numbers in range; `out` gets them (NaN fails every comparison)."""
    wrong = 0
    for i in range(len(values)):  # without a way out, and counted unsigned: so it is done in vectors
        v = values[np.uintp(i)]
        wrong += 0 if v >= 0 and v <= MAX_COUNT and v == np.floor(v) else 1
        out[np.uintp(i)] = np.uint32(v)
    return wrong == 0


@numba.njit(cache=True, nogil=True)
def _sort_rows(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_genes: int, repeated: np.ndarray) -> int:
    """Sort each row in place; the number of repeated genes, the first of them in `repeated`.

    Values are laid out over the genes and picked up in order, eight empty genes at a glance: linear in the
    row's length, where a comparison sort of a thousand genes takes twenty times as long.
    """
    words = (n_genes + 7) // 8
    marks64 = np.zeros(words, np.uint64)
    marks = marks64.view(np.uint8)
    values = np.zeros(n_genes, data.dtype)
    n_repeated = 0
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        ascending = True
        for i in range(start + 1, stop):
            if indices[i] <= indices[i - 1]:
                ascending = False
                break
        if ascending:
            continue
        clean = True
        for i in range(start, stop):
            gene = indices[i]
            if marks[gene]:
                if n_repeated < len(repeated):
                    repeated[n_repeated] = i
                n_repeated += 1
                clean = False
            marks[gene] = 1
            values[gene] = data[i]
        place = start
        for word in range(words):
            if marks64[word] == 0:
                continue
            for gene in range(word * 8, min(word * 8 + 8, n_genes)):
                if marks[gene]:
                    if clean:
                        indices[place] = gene
                        data[place] = values[gene]
                        place += 1
                    marks[gene] = 0
    return n_repeated


@numba.njit(cache=True, nogil=True)
def _take(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    order: np.ndarray,
    columns: np.ndarray,
    all_kept: bool,
    same: bool,
    out_indptr: np.ndarray,
    out_indices: np.ndarray,
    out_data: np.ndarray,
) -> None:
    place = np.uintp(0)
    for k in range(len(order)):
        genes = indices[indptr[order[k]] : indptr[order[k] + 1]]
        values = data[indptr[order[k]] : indptr[order[k] + 1]]
        n = len(genes)
        zeros = 0
        for i in range(n):
            zeros += values[np.uintp(i)] == 0
        if all_kept and zeros == 0:  # nearly always; such loops can be done in vectors
            if same:
                for i in range(n):
                    out_indices[place + np.uintp(i)] = genes[np.uintp(i)]
            else:
                for i in range(n):
                    out_indices[place + np.uintp(i)] = columns[np.uintp(genes[np.uintp(i)])]
            for i in range(n):
                out_data[place + np.uintp(i)] = values[np.uintp(i)]
            place += np.uintp(n)
        else:
            for i in range(n):
                column, value = columns[np.uintp(genes[np.uintp(i)])], values[np.uintp(i)]
                out_indices[place] = column
                out_data[place] = value
                place += np.uintp(1 if column >= 0 and value != 0 else 0)  # what is dropped is written over
        out_indptr[k + 1] = place
