"""Matrix products in compiled code, by the library that torch brings (MKL) and computes with itself.

Everything is float32, and rows lie one behind the other. Addresses are of bytes, lengths of rows in numbers.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit, types

from scarcade.engine.addresses import caller, functions_in

SCRATCH = 16  # int64 that a call needs for the numbers that it hands over by address
# of a kind of which numba makes no constants: it would compile a call for each
_NO, _N, _T = np.int64(0), np.int64(ord("N")), np.int64(ord("T"))
_ONE = 0x3F800000  # the bits of 1.0
_product: Any = caller(types.none, *[types.int64] * 13)
_number_of_threads: Any = caller(types.int32, types.int32)


@cache
def functions() -> tuple[int, ...] | None:
    """Where the product is, and what tells MKL how many threads it may take (`on_threads`); None without MKL."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if sys.platform != "linux" or not library.exists():
        return None
    # it is loaded already: this is the same one
    return functions_in(ctypes.CDLL(str(library)), ("sgemm_", "MKL_Set_Num_Threads_Local"))


@njit(forceinline=True, error_model="numpy")
def on_threads(function: int, n: int) -> int:
    """Let MKL have so many threads for what this one calls (0: as many as torch says). Returns what it was."""
    return _number_of_threads(function, (np.int32(n),))  # type: ignore[no-any-return]


@njit(forceinline=True, error_model="numpy")
def _call(function, turned_a, turned_b, m, n, k, a, a_row, b, b_row, adds, c, c_row, scratch_at) -> None:  # type: ignore[no-untyped-def]
    """Fortran's product of matrices whose columns lie one behind the other; all that it is told are addresses."""
    scratch, s = scratch_at[0], scratch_at[1]
    scratch[0], scratch[1] = turned_a, turned_b
    scratch[2], scratch[3], scratch[4], scratch[5], scratch[6], scratch[7] = m, n, k, a_row, b_row, c_row
    scratch[8], scratch[9] = _ONE, _ONE if adds else 0
    _product(function, (s, s + 8, s + 16, s + 24, s + 32, s + 64, a, s + 40, b, s + 48, s + 72, c, s + 56))


@njit(forceinline=True, error_model="numpy")
def by_rows(function, x, x_row, w, w_row, n, inputs, outputs, out, out_row, scratch) -> None:  # type: ignore[no-untyped-def]
    """``out = x W^T``: x (n, inputs), W (outputs, inputs)."""
    _call(function, _T, _N, outputs, n, inputs, w, w_row, x, x_row, _NO, out, out_row, scratch)


@njit(forceinline=True, error_model="numpy")
def back(function, d, d_row, w, w_row, n, inputs, outputs, out, out_row, scratch) -> None:  # type: ignore[no-untyped-def]
    """``out = d W``: d (n, outputs), W (outputs, inputs)."""
    _call(function, _N, _N, inputs, n, outputs, w, w_row, d, d_row, _NO, out, out_row, scratch)


@njit(forceinline=True, error_model="numpy")
def outer(function, d, d_row, x, x_row, n, inputs, outputs, adds, out, out_row, scratch) -> None:  # type: ignore[no-untyped-def]
    """``out = d^T x``, or with `adds` ``out += d^T x``: d (n, outputs), x (n, inputs)."""
    _call(function, _N, _T, inputs, outputs, n, x, x_row, d, d_row, np.int64(adds), out, out_row, scratch)
