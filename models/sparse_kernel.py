"""Products of a layer's weights with counts without their zeros, and the way back, by vectors of units.

Torch's own sparse products are no faster than the dense ones at the 5 to 15 % of single-cell counts. Here a count costs
as many instructions as its row of the weights has vectors: the rows are those of the transposed weights, which are
made strip by strip of genes, in squares of 16 x 16, and stay in a cache while all cells take from them, or add to them.
Each sum has one order, of genes or of cells, whatever the number of threads.

The two loops are written for the compiler (`_run`), because it keeps no sums in registers of a loop over memory.
Addresses are of bytes, and everything is float32. Shapes: B cells, G genes, H units, a multiple of `LANES`, N counts.
"""

# compiled with: 3c19d9e8d588

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from scarcade.engine.turned import SIDE, turned
from scarcade.engine.vector_math import bits32, of_ratio, wide

LANES = SIDE
_REAL, _WHOLE, _ADDRESS = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_REAL, LANES)
_TAKEN, _ADDED = 1 << 18, 1 << 17  # bytes of a strip, which stays in the second cache


def _at(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _vector_at(builder: Any, address: Any, j: int) -> Any:
    return _at(builder, builder.add(address, ir.Constant(_ADDRESS, 4 * LANES * j)), _VECTOR)


def _run(vectors: int, *, adds: bool) -> Any:
    """A compiled function for the counts [start, stop) of one cell and so many `vectors` of units.

    It adds ``value * row of the gene`` to the cell's units; or, with `adds`, ``value * units`` to the row. The row of
    gene g is at ``rows + g * row_bytes``.
    """

    def made(
        context: Any, units: Any, rows: Any, row_bytes: Any, genes: Any, values: Any, start: Any, stop: Any
    ) -> Any:
        def code(c: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            units, rows, row_bytes, genes, values, start, stop = arguments

            def product_and(a: Any, b: Any, plus: Any) -> Any:  # in one instruction where the processor has it
                return builder.fadd(builder.fmul(a, b, flags=("contract",)), plus, flags=("contract",))

            slots = [cgutils.alloca_once(builder, _VECTOR) for _ in range(vectors)]  # type: ignore[no-untyped-call]
            for j, slot in enumerate(slots):  # become registers
                builder.store(builder.load(_vector_at(builder, units, j), align=4), slot)
            with cgutils.for_range_slice(builder, start, stop, ir.Constant(_ADDRESS, 1), intp=_ADDRESS) as (k, _):
                place = builder.mul(k, ir.Constant(_ADDRESS, 4))
                gene = builder.sext(builder.load(_at(builder, builder.add(genes, place), _WHOLE)), _ADDRESS)
                value = builder.load(_at(builder, builder.add(values, place), _REAL))
                one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_WHOLE, 0))
                each = ir.Constant(ir.VectorType(_WHOLE, LANES), [0] * LANES)
                every = builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), each)
                row = builder.add(rows, builder.mul(gene, row_bytes))
                for j, slot in enumerate(slots):
                    part = _vector_at(builder, row, j)
                    of_row, own = builder.load(part, align=4), builder.load(slot)
                    if adds:
                        builder.store(product_and(own, every, of_row), part, align=4)
                    else:
                        builder.store(product_and(of_row, every, own), slot)
            if not adds:
                for j, slot in enumerate(slots):
                    builder.store(builder.load(slot), _vector_at(builder, units, j), align=4)
            return c.get_dummy_value()

        return types.none(*[types.int64] * 7), code

    return intrinsic(made)


def _by_vectors(*, adds: bool) -> Any:
    """`_run` for any number of units: eight vectors at a time, and what is left."""
    run_8, run_4, run_2, run_1 = (_run(vectors, adds=adds) for vectors in (8, 4, 2, 1))

    @njit(forceinline=True, error_model="numpy")
    def by_vectors(units, n_units, rows, row_bytes, genes, values, start, stop) -> None:  # type: ignore[no-untyped-def]
        h = np.int64(0)
        while n_units - h >= 8 * LANES:
            run_8(units + 4 * h, rows + 4 * h, row_bytes, genes, values, start, stop)
            h += 8 * LANES
        if n_units - h >= 4 * LANES:
            run_4(units + 4 * h, rows + 4 * h, row_bytes, genes, values, start, stop)
            h += 4 * LANES
        if n_units - h >= 2 * LANES:
            run_2(units + 4 * h, rows + 4 * h, row_bytes, genes, values, start, stop)
            h += 2 * LANES
        if n_units - h >= LANES:
            run_1(units + 4 * h, rows + 4 * h, row_bytes, genes, values, start, stop)

    return by_vectors


_taken, _added = _by_vectors(adds=False), _by_vectors(adds=True)


@njit(forceinline=True, error_model="numpy")
def _from(gene, indptr, genes, start, stop, next_B) -> None:  # type: ignore[no-untyped-def]
    """Where the genes from `gene` on begin in each cell, which has them in ascending order."""
    for b in range(start, stop):
        low, high = indptr[b], indptr[b + 1]
        while low < high:
            middle = (low + high) // 2
            if genes[middle] < gene:
                low = middle + 1
            else:
                high = middle
        next_B[b - start] = low


@njit(forceinline=True, error_model="numpy")
def _until(gene, genes, k, stop):  # type: ignore[no-untyped-def]
    while k < stop and genes[np.uintp(k)] < gene:
        k += 1
    return k


@njit(forceinline=True, error_model="numpy")
def _strip(n_units, n_genes, most):  # type: ignore[no-untyped-def]
    """How many genes are done together: as many as have their rows in `most` bytes."""
    return min(max(most // (4 * n_units * LANES), 1) * LANES, n_genes)


@njit(forceinline=True, error_model="numpy")
def _aligned(n_rows, n_units):  # type: ignore[no-untyped-def]
    """A matrix, and its address, which begins a line of the cache: a vector in two lines is read in two steps."""
    raw = np.empty(n_rows * n_units + LANES, np.float32)
    skipped = (-np.int64(raw.ctypes.data) % 64) // 4
    matrix = raw[skipped : skipped + n_rows * n_units].reshape(n_rows, n_units)
    return matrix, np.int64(raw.ctypes.data) + 4 * skipped


@njit(nogil=True, cache=True, error_model="numpy")
def forward(start, stop, indptr, genes, values, n_genes, weight_HI, out_BH) -> None:  # type: ignore[no-untyped-def]
    """``x W^T`` of the cells [start, stop), in these rows of `out_BH`. Genes are the first inputs of `weight_HI`."""
    wide()
    n_units = np.int64(out_BH.shape[1])
    strip = _strip(n_units, n_genes, _TAKEN)
    rows, rows_at = _aligned(strip, n_units)
    unit_bytes = 4 * n_units
    next_B = np.empty(stop - start, np.int64)
    _from(0, indptr, genes, start, stop, next_B)
    gene_at, value_at = np.int64(genes.ctypes.data), np.int64(values.ctypes.data)
    weight_at, out_at = np.int64(weight_HI.ctypes.data), np.int64(out_BH.ctypes.data)
    out_BH[start:stop] = 0
    for first in range(0, n_genes, strip):
        end = min(first + strip, n_genes)
        whole = (end - first) // LANES * LANES
        turned(weight_at + 4 * first, 4 * weight_HI.shape[1], n_units, whole, rows_at, unit_bytes)
        for g in range(whole, end - first):
            for h in range(n_units):  # a row at a time, numba would compile for seconds
                rows[g, h] = weight_HI[h, first + g]
        for b in range(start, stop):
            k, after = next_B[b - start], indptr[b + 1]
            until = after if end == n_genes else _until(end, genes, k, after)
            units = out_at + b * unit_bytes
            _taken(units, n_units, rows_at - first * unit_bytes, unit_bytes, gene_at, value_at, k, until)
            next_B[b - start] = until


@njit(nogil=True, cache=True, error_model="numpy")
def backward(start, stop, indptr, genes, values, d_BH, d_weight_HI) -> None:  # type: ignore[no-untyped-def]
    """The gradient of the weights of the genes [start, stop), in these columns of `d_weight_HI`."""
    wide()
    n_cells, n_all = len(d_BH), d_BH.shape[1]
    width = np.int64(min(n_all, 8 * LANES))  # few units at a time, so that a strip has many genes
    strip = _strip(width, stop - start, _ADDED)
    rows, rows_at = _aligned(strip, width)
    next_B = np.empty(n_cells, np.int64)
    gene_at, value_at = np.int64(genes.ctypes.data), np.int64(values.ctypes.data)
    d_at, d_weight_at = np.int64(d_BH.ctypes.data), np.int64(d_weight_HI.ctypes.data)
    inputs, row_bytes = d_weight_HI.shape[1], 4 * width
    for unit in range(0, n_all, width):
        n_units = np.int64(min(width, n_all - unit))
        _from(start, indptr, genes, 0, n_cells, next_B)
        for first in range(start, stop, strip):
            end = min(first + strip, stop)
            whole = (end - first) // LANES * LANES
            rows[:] = 0
            for b in range(n_cells):
                k = next_B[b]
                until = _until(end, genes, k, indptr[b + 1])
                units = d_at + 4 * (b * n_all + unit)
                _added(units, n_units, rows_at - first * row_bytes, row_bytes, gene_at, value_at, k, until)
                next_B[b] = until
            turned(rows_at, row_bytes, whole, n_units, d_weight_at + 4 * (unit * inputs + first), 4 * inputs)
            for g in range(whole, end - first):
                for h in range(n_units):
                    d_weight_HI[unit + h, first + g] = rows[g, h]


@njit(nogil=True, cache=True, error_model="numpy")
def take_logs(counts, logs) -> None:  # type: ignore[no-untyped-def]
    """ln(1 + count) of each."""
    wide()
    lowest, highest = np.int32(0), np.int32(0)
    for k in range(len(counts)):
        bits = bits32(counts[k])
        lowest, highest = min(lowest, bits), max(highest, bits)
        logs[k] = of_ratio(counts[k])[0]
    if lowest < np.int32(0) or highest >= np.int32(0x7F800000):  # of others than finite numbers that was made up
        for k in range(len(counts)):
            logs[k] = np.float32(np.log1p(np.float64(counts[k])))
