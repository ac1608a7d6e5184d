"""For compiled code: C functions that are called, and arrays that lie, at an address that is known when it runs.

A thread that never asks for the interpreter's lock (`engine.crew`) is given numbers only. Numba's own way to a C
function writes its address into the compiled code, which could then not be kept on disk. Reading a store needs this, so
nothing here imports torch.
"""

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def caller(result: Any, *kinds: Any) -> Any:
    """A compiled function of an address and a tuple of arguments, that calls the C function there.

    Args:
        result: what C returns, as a type of numba; `types.none` if that is nothing.
        kinds: of the arguments.
    """

    def call(context: Any, address: Any, arguments: Any) -> Any:
        def code(c: Any, builder: Any, signature: Any, given: Any) -> Any:
            nothing = result == types.none
            returned = ir.VoidType() if nothing else c.get_value_type(result)
            function = ir.FunctionType(returned, [c.get_value_type(kind) for kind in kinds])
            each = [builder.extract_value(given[1], i) for i in range(len(kinds))]
            found = builder.call(builder.inttoptr(given[0], function.as_pointer()), each)
            return c.get_dummy_value() if nothing else found

        return result(types.int64, types.Tuple(kinds)), code  # type: ignore[no-untyped-call]

    return intrinsic(call)


def _pointer_made(context: Any, address: Any) -> Any:
    def code(c: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), code


_pointer: Any = intrinsic(_pointer_made)


@njit(forceinline=True, error_model="numpy")
def array_at(address, shape, kind):  # type: ignore[no-untyped-def]
    """The array of numbers of a `kind` that lies there, rows one behind the other. `shape` is a tuple."""
    return carray(_pointer(address), shape, kind)


@njit(forceinline=True, error_model="numpy")
def numbers_at(address, *shape):  # type: ignore[no-untyped-def]
    """int64."""
    return carray(_pointer(address), shape, np.int64)


@njit(forceinline=True, error_model="numpy")
def places_at(address, *shape):  # type: ignore[no-untyped-def]
    """int32."""
    return carray(_pointer(address), shape, np.int32)


@njit(forceinline=True, error_model="numpy")
def reals_at(address, *shape):  # type: ignore[no-untyped-def]
    """float32."""
    return carray(_pointer(address), shape, np.float32)


def address_of(array: "np.ndarray | Tensor") -> int:
    """Where the numbers of an array lie; it must be kept, and lie one behind the other."""
    if isinstance(array, np.ndarray):
        assert array.flags.c_contiguous
        return int(array.__array_interface__["data"][0])
    assert array.is_contiguous()
    return array.data_ptr()


def functions_in(library: ctypes.CDLL, names: "Iterable[str]") -> tuple[int, ...] | None:
    """Where functions of a library lie; None if it has not all of them."""
    try:
        found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
    except AttributeError:
        return None
    return tuple(int(address or 0) for address in found)
