"""Numbers in memory that processes share, by which they tell each other how far they are.

A number is written after all that its writer wrote before, and what was written before it is seen by whoever reads it:
so the memory beside needs no lock. Python has no such writes and reads; they are made for numba here.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LINE = 8  # numbers from one flag to the next: processes that write side by side must not share a line of the cache


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


def _write_made(context: Any, address: Any, number: Any) -> Any:
    def code(c: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, number = arguments
        builder.store_atomic(number, _pointer(builder, address), "release", 8)
        return c.get_dummy_value()

    return types.none(types.int64, types.int64), code


def _read_made(context: Any, address: Any) -> Any:
    def code(c: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), code


_write: Any = intrinsic(_write_made)
_read: Any = intrinsic(_read_made)


@njit(nogil=True, cache=True)
def tell(flags: np.ndarray, place: int, number: int) -> None:
    """Set a flag, after everything that was written before."""
    _write(np.int64(flags.ctypes.data) + 8 * LINE * place, np.int64(number))


@njit(nogil=True, cache=True)
def late(flags: np.ndarray, first: int, count: int, number: int, looks: int) -> int:
    """The place of the first flag of `count` that has not come to `number` after so many looks; -1 if all have."""
    base = np.int64(flags.ctypes.data)
    place = first
    for _ in range(looks):
        while place < first + count and _read(base + 8 * LINE * place) >= number:
            place += 1
        if place == first + count:
            return -1
    return place
