"""Compiled loops over CSR rows: gather, scatter, shuffle. None of them holds the interpreter lock.

They index without bounds checks, so whoever calls them has checked first: `engine.csr` for what comes from
outside, the column maximum of every decoded chunk for what comes from a store.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_AHEAD = 2  # cells
_STRIP = 2048  # genes: 8 kB of a dense row


def _fetching(to_write: int) -> Any:
    """The code of a prefetch: the processor is asked to have an element in its cache soon; nothing is read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer_type = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        start = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(start, [arguments[1]]), pointer_type)
        kind = ir.FunctionType(ir.VoidType(), [pointer_type, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer_type], kind)
        builder.call(function, [pointer, word(to_write), word(3), word(1)])  # into every level; data
        return context.get_dummy_value()

    return generate


@intrinsic
def _fetch(_typing: Any, array: Any, index: Any) -> Any:
    """``_fetch(array, index)``: that element will be read.

    The cells of a batch lie anywhere in a window. Asking two cells ahead hides the way to memory: 420 instead of
    700 ns a cell at 2,000 genes.
    """
    return types.void(array, types.intp), _fetching(0)


@intrinsic
def _own(_typing: Any, array: Any, index: Any) -> Any:
    """``_own(array, index)``: that element will be written."""
    return types.void(array, types.intp), _fetching(1)


@njit(nogil=True, cache=True)
def _fetch_cell(indices: np.ndarray, data: np.ndarray, start: int, length: int) -> None:
    for k in range(start, start + length, 64 // indices.itemsize):
        _fetch(indices, k)  # type: ignore[call-arg]
    for k in range(start, start + length, 64 // data.itemsize):
        _fetch(data, k)  # type: ignore[call-arg]


@njit(nogil=True, cache=True)
def scatter(
    indices: np.ndarray, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray, in_order: bool, out: np.ndarray
) -> None:
    """Dense float32 rows (n, n_genes) of the cells whose counts begin at `starts`; `out` is overwritten.

    `in_order`: they stand one behind the other, as the processor expects without being asked.
    """
    n, n_genes = out.shape
    for i in range(n):
        if not in_order and i + _AHEAD < n:
            _fetch_cell(indices, data, starts[i + _AHEAD], lengths[i + _AHEAD])
        row = out[i]
        columns = indices[starts[i] : starts[i] + lengths[i]]
        values = data[starts[i] : starts[i] + lengths[i]]
        # places are counted unsigned: numba checks signed ones for negative values, a quarter of the time
        if n_genes <= 2 * _STRIP:
            row[:] = 0.0
            for k in range(len(columns)):
                row[columns[np.uintp(k)]] = values[np.uintp(k)]
            continue
        # long rows strip by strip, cleared and filled while in the first cache (columns ascend; if they did not,
        # a value would still come after its strip was cleared)
        at, end = np.uintp(0), np.uintp(len(columns))
        for strip in range(0, n_genes, _STRIP):
            stop = min(strip + _STRIP, n_genes)
            row[strip:stop] = 0.0
            while at < end and columns[at] < stop:
                row[columns[at]] = values[at]
                at += np.uintp(1)


@njit(nogil=True, cache=True)
def scatter_log1p(
    indices: np.ndarray,
    data: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    in_order: bool,
    table: np.ndarray,
    out: np.ndarray,
) -> None:
    """As `scatter`, ln(1 + count): whole numbers below ``len(table)`` are looked up there.

    `table` and `out` are float32, or bfloat16 as uint16.
    """
    n = len(out)
    one_float = np.empty(1, np.float32)
    its_bits = one_float.view(np.uint32)
    for i in range(n):
        if not in_order and i + _AHEAD < n:
            _fetch_cell(indices, data, starts[i + _AHEAD], lengths[i + _AHEAD])
        row = out[i]
        columns = indices[starts[i] : starts[i] + lengths[i]]
        values = data[starts[i] : starts[i] + lengths[i]]
        row[:] = 0
        for k in range(len(columns)):
            value = values[np.uintp(k)]
            place = np.uintp(value) if 0 <= value < len(table) else np.uintp(0)
            if place == value:
                row[columns[np.uintp(k)]] = table[place]
                continue
            one_float[0] = np.float32(np.log1p(np.float64(value)))
            if table.itemsize == 4:
                row[columns[np.uintp(k)]] = one_float[0]
            else:  # to the nearest, of two the even one
                bits = its_bits[0]
                row[columns[np.uintp(k)]] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16)


@njit(nogil=True, cache=True)
def _copy(source: np.ndarray, out: np.ndarray) -> None:
    for k in range(len(source)):
        out[np.uintp(k)] = source[np.uintp(k)]  # unsigned, or the check for negative places forbids vectors


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
    n = len(starts)
    for i in range(n):
        if i + _AHEAD < n:
            _fetch_cell(indices, data, starts[i + _AHEAD], lengths[i + _AHEAD])
        stop = starts[i] + lengths[i]
        _copy(indices[starts[i] : stop], out_indices[at : at + lengths[i]])
        _copy(data[starts[i] : stop], out_data[at : at + lengths[i]])
        at += lengths[i]


@njit(nogil=True, cache=True)
def rename(indices: np.ndarray, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> None:
    """Give the genes of each cell their `places`, in place; those at -1 are dropped and `lengths` shortened.

    What is left of a cell is not sorted any more.
    """
    for i in range(len(starts)):
        to = starts[i]
        for k in range(starts[i], starts[i] + lengths[i]):
            place = places[indices[k]]
            if place >= 0:
                indices[to] = place
                data[to] = data[k]
                to += 1
        lengths[i] = to - starts[i]


@njit(nogil=True, cache=True)
def sort_cells(indices: np.ndarray, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
    """Put the counts of each cell into the order of their genes, in place."""
    for i in range(len(starts)):
        cell = slice(starts[i], starts[i] + lengths[i])
        order = np.argsort(indices[cell])
        indices[cell] = indices[cell][order]
        data[cell] = data[cell][order]


@njit(nogil=True, cache=True)
def deliver(
    indices: np.ndarray,
    data: np.ndarray,
    begin: int,
    row: int,
    starts: np.ndarray,
    lengths: np.ndarray,
    places: np.ndarray,
    out_indices: np.ndarray,
    out_data: np.ndarray,
) -> int:
    """Copy what a chunk (the counts from `begin` on) holds of the cells from `row` on to their places.

    ``starts`` says where the counts of each cell stand in the file. Returns the cell to go on with in the chunk
    that follows: the last one of this chunk, where it reaches beyond.
    """
    end, n_rows = begin + len(indices), len(starts)
    while row < n_rows and starts[row] < end:
        if row + _AHEAD < n_rows:
            there = places[row + _AHEAD]
            for k in range(there, there + lengths[row + _AHEAD], 64 // indices.itemsize):
                _own(out_indices, k)  # type: ignore[call-arg]
            for k in range(there, there + lengths[row + _AHEAD], 64 // data.itemsize):
                _own(out_data, k)  # type: ignore[call-arg]
        first, stop = max(starts[row], begin), starts[row] + lengths[row]
        at, to, n = first - begin, places[row] + first - starts[row], min(stop, end) - first
        _copy(indices[at : at + n], out_indices[to : to + n])
        _copy(data[at : at + n], out_data[to : to + n])
        if stop > end:
            return row
        row += 1
    return row
