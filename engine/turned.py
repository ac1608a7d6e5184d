"""The transpose of a matrix of float32 in compiled code, by squares of 16 x 16 that stay in registers.

Addresses, and the lengths of rows, are of bytes.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SIDE = 16
_WHOLE, _ADDRESS = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(ir.FloatType(), SIDE)


def _square_made(context: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
    """Transposes `SIDE` rows of `SIDE` numbers: in four rounds, each of which exchanges halves of halves."""

    def code(c: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_row, target, target_row = arguments

        def row(base: Any, row_bytes: Any, i: int) -> Any:
            place = builder.add(base, builder.mul(row_bytes, ir.Constant(_ADDRESS, i)))
            return builder.inttoptr(place, _VECTOR.as_pointer())

        def picked(a: Any, b: Any, places: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WHOLE, SIDE), places))

        rows = [builder.load(row(source, source_row, i), align=4) for i in range(SIDE)]
        half = SIDE // 2
        while half:
            for i in range(SIDE):
                if not i & half:
                    a, b = rows[i], rows[i | half]
                    rows[i] = picked(a, b, [SIDE + (j ^ half) if j & half else j for j in range(SIDE)])
                    rows[i | half] = picked(a, b, [SIDE + j if j & half else j | half for j in range(SIDE)])
            half //= 2
        for i, made in enumerate(rows):
            builder.store(made, row(target, target_row, i), align=4)
        return c.get_dummy_value()

    return types.none(*[types.int64] * 4), code


_square: Any = intrinsic(_square_made)


@njit(forceinline=True, error_model="numpy")
def turned(source, source_row, n_rows, n_columns, target, target_row) -> None:  # type: ignore[no-untyped-def]
    """The transpose of a matrix whose sides are multiples of `SIDE`."""
    for i in range(0, n_rows, SIDE):
        for j in range(0, n_columns, SIDE):
            _square(source + i * source_row + 4 * j, source_row, target + j * target_row + 4 * i, target_row)
