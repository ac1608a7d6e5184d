"""For compiled code: C functions that are called, and arrays that lie, at an address that is known when it runs.

A thread that never asks for the interpreter's lock (`engine.crew`) is given numbers only. Numba's own way to a C
function writes its address into the compiled code, which could then not be kept on disk.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

_NUMBER, _STATUS, _NOTHING = ir.IntType(64), ir.IntType(32), ir.VoidType()


def _caller(n: int, *, status: bool) -> Any:
    """A compiled function of an address and a tuple of `n` int64, with which it calls the function there."""

    def call(context: Any, function: Any, arguments: Any) -> Any:
        def code(c: Any, builder: Any, signature: Any, given: Any) -> Any:
            kind = ir.FunctionType(_STATUS if status else _NOTHING, [_NUMBER] * n)
            numbers = [builder.extract_value(given[1], i) for i in range(n)]
            found = builder.call(builder.inttoptr(given[0], kind.as_pointer()), numbers)
            return found if status else c.get_dummy_value()

        return (types.int32 if status else types.none)(types.int64, types.UniTuple(types.int64, n)), code  # type: ignore[no-untyped-call]

    return intrinsic(call)


call_1: Any = _caller(1, status=True)  # what C returns as int, of one argument
call_2: Any = _caller(2, status=False)
call_13: Any = _caller(13, status=False)


def _pointer_made(context: Any, address: Any) -> Any:
    def code(c: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), code


_pointer: Any = intrinsic(_pointer_made)


@njit(forceinline=True, error_model="numpy")
def numbers_at(address: int, n: int) -> np.ndarray:
    """int64 (n,)."""
    return carray(_pointer(address), (n,), np.int64)


@njit(forceinline=True, error_model="numpy")
def places_at(address: int, n: int) -> np.ndarray:
    """int32 (n,)."""
    return carray(_pointer(address), (n,), np.int32)


@njit(forceinline=True, error_model="numpy")
def doubles_at(address: int, n: int) -> np.ndarray:
    """float64 (n,)."""
    return carray(_pointer(address), (n,), np.float64)


@njit(forceinline=True, error_model="numpy")
def reals_at(address: int, n: int) -> np.ndarray:
    """float32 (n,)."""
    return carray(_pointer(address), (n,), np.float32)


@njit(forceinline=True, error_model="numpy")
def rows_at(address: int, n: int, width: int) -> np.ndarray:
    """float32 (n, width), rows one behind the other."""
    return carray(_pointer(address), (n, width), np.float32)


@njit(forceinline=True, error_model="numpy")
def place_rows_at(address: int, n: int, width: int) -> np.ndarray:
    """int32 (n, width), rows one behind the other."""
    return carray(_pointer(address), (n, width), np.int32)


def address_of(array: np.ndarray | torch.Tensor) -> int:
    """Where the numbers of an array lie; it must be kept, and lie one behind the other."""
    if isinstance(array, torch.Tensor):
        assert array.is_contiguous()
        return array.data_ptr()
    assert array.flags.c_contiguous
    return int(array.__array_interface__["data"][0])


@cache
def functions_of_torch(names: Sequence[str]) -> tuple[int, ...] | None:
    """Where functions of the libraries in torch's CPU library lie; None if it has not all of them."""
    found = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if sys.platform != "linux" or not found.exists():
        return None
    library = ctypes.CDLL(str(found))  # it is loaded already: this is the same one
    return _addresses(library, names)


@cache
def functions_of_c(names: Sequence[str]) -> tuple[int, ...] | None:
    """The same of the C library."""
    return _addresses(ctypes.CDLL(None), names) if sys.platform == "linux" else None


def _addresses(library: ctypes.CDLL, names: Sequence[str]) -> tuple[int, ...] | None:
    try:
        found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
    except AttributeError:
        return None
    return tuple(address for address in found if address is not None)
