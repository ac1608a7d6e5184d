"""Matrix products in compiled code, tile by tile: 6 x 16 sums stay in registers while a row and a column pass by.

The algorithm is that of Goto and van de Geijn (2008, Anatomy of high-performance matrix multiplication) in the form of
BLIS (Van Zee and van de Geijn 2015), for matrices with some hundred rows on one side. Of the two that are multiplied
one is read where it lies, and of the other a panel, 16 columns of it, is laid down one row behind the other: that is
all that is copied. MKL copies both, and clears the third one before it adds to it. What comes next is asked of the
memory while a tile is computed (docs/decisions/018-tiles.md has what that gains).

Each number is the sum over k in ascending order, in parts of `DEEP`: its bits do not depend on which rows are computed
beside it. Everything is float32, and rows lie one behind the other. Addresses are of bytes, lengths of rows in numbers.
"""

from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core import config as numba_config
from numba.extending import intrinsic

from scarcade.engine.addresses import reals_at
from scarcade.engine.turned import SIDE, turned

COLUMNS = SIDE
ROWS = 6  # with two vectors each they take 12 of the 16 registers of AVX2
DEEP = 256  # numbers of a sum at a time: a panel of 16 kB, which stays in the first cache
HIGH = 40 * ROWS  # rows at a time: with `DEEP` they stay in the second
SCRATCH = COLUMNS * (DEEP + HIGH)  # float32 that a product needs to work in
# the third generation was; the second has vectors, caches and instructions of the same kind, the first has half of them
MEASURED = ("znver2", "znver3")
_LANES, _LINE = 8, 64  # numbers of a vector, bytes of a line of the cache
_REAL, _WHOLE, _ADDRESS = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_REAL, _LANES)
# of a kind of which numba makes no constants: it would compile a product for each
_NO, _YES, _EACH = np.int64(0), np.int64(1), np.int64(4)


@cache
def are_faster() -> bool:
    """Whether they beat MKL here: on AMD's processors of `MEASURED`.

    Not if numba was told for what to compile: without its instruction, each fused product is a call.
    """
    told = getattr(numba_config, "CPU_NAME", None) or getattr(numba_config, "CPU_FEATURES", None)
    if told or llvm.get_host_cpu_name() not in MEASURED:
        return False
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # where LLVM cannot tell
        return False
    return bool(features.get("avx2") and features.get("fma"))


def _tile(rows: int) -> Any:
    """A compiled function for so many rows of a tile.

    ``c[i, :16] = sum over k < n_k of a[i, k] * b[k, :16]``, or with `adds` more of it. a[i, k] lies at
    ``a + i * a_i + k * a_k``, b's rows 64 bytes from each other, c's `c_row`.
    """
    vectors = range(COLUMNS // _LANES)

    def made(context: Any, a: Any, a_i: Any, a_k: Any, b: Any, n_k: Any, c: Any, c_row: Any, adds: Any) -> Any:
        def code(ctx: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_i, a_k, b, n_k, c, c_row, adds = arguments
            begin, one = ir.Constant(_ADDRESS, 0), ir.Constant(_ADDRESS, 1)
            undefined, zeros = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_VECTOR, [0.0] * _LANES)
            first, each = ir.Constant(_WHOLE, 0), ir.Constant(ir.VectorType(_WHOLE, _LANES), [0] * _LANES)
            kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
            fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{_LANES}f32")  # type: ignore[no-untyped-call]

            def moved(base: Any, step: Any, n: int) -> Any:
                return builder.add(base, builder.mul(step, ir.Constant(_ADDRESS, n)))

            def at(address: Any, kind: ir.Type) -> Any:
                return builder.inttoptr(address, kind.as_pointer())

            def vector_at(base: Any, j: int) -> Any:
                return at(builder.add(base, ir.Constant(_ADDRESS, 4 * _LANES * j)), _VECTOR)

            starts, targets = ([moved(base, row, i) for i in range(rows)] for base, row in ((a, a_i), (c, c_row)))
            sums = {(i, j): cgutils.alloca_once(builder, _VECTOR) for i in range(rows) for j in vectors}  # type: ignore[no-untyped-call]
            for place in sums.values():  # become registers
                builder.store(zeros, place)
            with cgutils.for_range_slice(builder, begin, n_k, one, intp=_ADDRESS) as (k, _):
                row, passed = builder.add(b, builder.mul(k, ir.Constant(_ADDRESS, 4 * COLUMNS))), builder.mul(k, a_k)
                of_row = [builder.load(vector_at(row, j), align=4) for j in vectors]
                for i in range(rows):
                    number = builder.load(at(builder.add(starts[i], passed), _REAL))
                    every = builder.shuffle_vector(builder.insert_element(undefined, number, first), undefined, each)
                    for j in vectors:
                        builder.store(builder.call(fma, (every, of_row[j], builder.load(sums[i, j]))), sums[i, j])
            # what is there is added at last: the sums of the next tile do not wait for it
            with builder.if_then(builder.icmp_signed("!=", adds, begin)):
                for (i, j), place in sums.items():
                    found = builder.load(vector_at(targets[i], j), align=4)
                    builder.store(builder.fadd(found, builder.load(place)), place)
            for (i, j), place in sums.items():
                builder.store(builder.load(place), vector_at(targets[i], j), align=4)
            return ctx.get_dummy_value()

        return types.none(*[types.int64] * 8), code

    return intrinsic(made)


def _ahead(writes: int) -> Any:
    """A compiled function that asks for the line of an address, before it is read or written; it may be any address."""

    def made(context: Any, address: Any) -> Any:
        def code(ctx: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, _WHOLE, _WHOLE, _WHOLE])
            prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")  # type: ignore[no-untyped-call]
            into_all_caches, of_data = 3, 1
            how = (ir.Constant(_WHOLE, number) for number in (writes, into_all_caches, of_data))
            builder.call(prefetch, (builder.inttoptr(arguments[0], pointer), *how))
            return ctx.get_dummy_value()

        return types.none(types.int64), code

    return intrinsic(made)


def _row_made(context: Any, source: Any, target: Any) -> Any:
    """Copies a row of a panel."""

    def code(ctx: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row = ir.VectorType(_REAL, COLUMNS).as_pointer()
        source, target = (builder.inttoptr(address, row) for address in arguments)
        builder.store(builder.load(source, align=4), target, align=4)
        return ctx.get_dummy_value()

    return types.none(types.int64, types.int64), code


_row: Any = intrinsic(_row_made)
_to_read, _to_write = _ahead(0), _ahead(1)
_tile_6, _tile_4, _tile_2, _tile_1 = (_tile(rows) for rows in (ROWS, 4, 2, 1))


@njit(forceinline=True, error_model="numpy")
def _tiles(n_rows, a, a_i, a_k, b, n_k, c, c_row, adds, following) -> None:  # type: ignore[no-untyped-def]
    """As `_tile`, of any number of rows. Lines that are `following` are asked for, some with each tile."""
    (start, row, per_row, n_lines), asked, left = following, 0, n_rows
    at_once = n_lines * ROWS // n_rows + 1
    while left >= ROWS:
        for r in range(ROWS, 2 * ROWS):
            _to_write(c + r * c_row)
        for line in range(asked, min(asked + at_once, n_lines)):
            _to_read(start + line // per_row * row + line % per_row * _LINE)
        asked += at_once
        _tile_6(a, a_i, a_k, b, n_k, c, c_row, adds)
        a, c, left = a + ROWS * a_i, c + ROWS * c_row, left - ROWS
    if left >= 4:
        _tile_4(a, a_i, a_k, b, n_k, c, c_row, adds)
        a, c, left = a + 4 * a_i, c + 4 * c_row, left - 4
    if left >= 2:
        _tile_2(a, a_i, a_k, b, n_k, c, c_row, adds)
        a, c, left = a + 2 * a_i, c + 2 * c_row, left - 2
    if left:
        _tile_1(a, a_i, a_k, b, n_k, c, c_row, adds)


@njit(forceinline=True, error_model="numpy")
def _copied(n_rows, n_columns, source, source_row, target, target_row) -> None:  # type: ignore[no-untyped-def]
    for i in range(n_rows):
        of_source, of_target = (
            reals_at(source + i * source_row, n_columns),
            reals_at(target + i * target_row, n_columns),
        )
        for j in range(n_columns):
            of_target[j] = of_source[j]


@njit(forceinline=True, error_model="numpy")
def _panel(b, b_row, turns, n_columns, n_k, to) -> None:  # type: ignore[no-untyped-def]
    """Up to 16 columns of a matrix, or with `turns` rows, as a tile takes them; further ones are zeros."""
    panel = reals_at(to, n_k, COLUMNS)
    if n_columns < COLUMNS:
        panel[:] = 0
    if turns:
        done = n_k // SIDE * SIDE if n_columns == COLUMNS else 0
        turned(b, b_row, COLUMNS, done, to, 4 * COLUMNS)
        for j in range(n_columns):
            of_column = reals_at(b + j * b_row, n_k)
            for k in range(done, n_k):
                panel[k, j] = of_column[k]
    elif n_columns == COLUMNS:
        for k in range(n_k):
            _row(b + k * b_row, to + 4 * COLUMNS * k)
    else:
        _copied(n_k, n_columns, b, b_row, to, 4 * COLUMNS)


# Numba hands "forceinline" and "fastmath" on to what a function calls, and would compile three copies of this. It has
# no arithmetic but that of `_tile`, operation by operation: its bits do not depend on where it was compiled
# (tests/models/test_compiled_bits.py).
@njit(forceinline=False, fastmath=False, error_model="numpy")
def _product(turns, n_rows, n_columns, n_k, a, a_i, a_k, b, b_row, adds, c, c_row, scratch) -> None:  # type: ignore[no-untyped-def]
    """``c = a b``, or with `turns` ``a b^T``, or with `adds` more of it. All that is given is in bytes."""
    for k in range(0, max(n_k, 1), DEEP):
        deep, further = min(DEEP, n_k - k), np.int64(adds or k > 0)
        for i in range(0, n_rows, HIGH):
            high, from_a, to = min(HIGH, n_rows - i), a + i * a_i + k * a_k, c + i * c_row
            for j in range(0, n_columns, COLUMNS):
                n, at, row = min(COLUMNS, n_columns - j), to + 4 * j, c_row
                # the panel's rows of b, each of some lines; or its columns, each row of which is in one
                from_b, step = (
                    (b + j * b_row + 4 * k, COLUMNS * b_row) if turns else (b + k * b_row + 4 * j, 4 * COLUMNS)
                )
                per_row, n_lines = (max(4 * deep // _LINE, 1), COLUMNS) if turns else (1, deep)
                n_lines *= per_row * (j + 2 * COLUMNS <= n_columns)
                _panel(from_b, b_row, turns, n, deep, scratch)
                if n < COLUMNS:
                    at, row = scratch + 4 * COLUMNS * DEEP, 4 * COLUMNS
                    _copied(high * further, n, to + 4 * j, c_row, at, row)
                following = from_b + step, b_row, per_row, n_lines
                _tiles(high, from_a, a_i, a_k, scratch, deep, at, row, further, following)
                if n < COLUMNS:
                    _copied(high, n, at, row, to + 4 * j, c_row)


@njit(forceinline=True, error_model="numpy")
def by_rows(x, x_row, w, w_row, n, inputs, outputs, out, out_row, scratch) -> None:  # type: ignore[no-untyped-def]
    """``out = x W^T``: x (n, inputs), W (outputs, inputs). Scratch: the address of `SCRATCH` numbers."""
    _product(_YES, n, outputs, inputs, x, 4 * x_row, _EACH, w, 4 * w_row, _NO, out, 4 * out_row, scratch)


@njit(forceinline=True, error_model="numpy")
def back(d, d_row, w, w_row, n, inputs, outputs, out, out_row, scratch) -> None:  # type: ignore[no-untyped-def]
    """``out = d W``: d (n, outputs), W (outputs, inputs)."""
    _product(_NO, n, inputs, outputs, d, 4 * d_row, _EACH, w, 4 * w_row, _NO, out, 4 * out_row, scratch)


@njit(forceinline=True, error_model="numpy")
def outer(d, d_row, x, x_row, n, inputs, outputs, adds, out, out_row, scratch) -> None:  # type: ignore[no-untyped-def]
    """``out = d^T x``, or with `adds` ``out += d^T x``: d (n, outputs), x (n, inputs)."""
    _product(_NO, outputs, inputs, n, d, _EACH, 4 * d_row, x, 4 * x_row, np.int64(adds), out, 4 * out_row, scratch)
