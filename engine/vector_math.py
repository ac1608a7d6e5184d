"""Functions of float32 for loops that become vector code, and what keeps such loops so.

exp, log and the gamma function are written out because a call into the C library would keep the compiler from
making vector code of the loops. Theirs are the flags "contract" alone: full fast math would rearrange their
error terms. "numpy" as error model leaves out the test for a zero divisor, which has the same effect as a call.

Numba's cache goes by what is in a function's own file. So whatever is compiled with functions of another file has a
line that changes with that one: ``# compiled with: ...``, which tests/models/test_compiled_with.py looks after.
Whatever is called from a cached function is forced inline: a callee of its own would run as it was compiled alone
where the code is fresh, and as it was optimised within its caller where it comes from the cache, with other bits.

Errors (tests/engine/test_vector_math.py): float32 functions 2 units in the last place, float64 ones 1e-10.
Shapes: G numbers.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

APART = 256  # numbers: more than any loop takes in one turn
EXACT = {"contract"}
SUMS = {"contract", "reassoc", "nsz", "nnan", "ninf", "arcp"}

LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
LOG2_E = np.float32(1.44269504)
LN2 = math.log(2.0)
SQRT_HALF_32, SQRT_HALF_64 = 0x3F3504F3, 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
HALF_LOG_2PI = 0.9189385332046727


def _bitcast(wanted: Any, given: Any, raw: ir.Type) -> Any:
    """A compiled function that reads the bits of a `given` as a `wanted`."""

    def bits(context: Any, x: Any) -> Any:
        return wanted(given), lambda c, builder, signature, arguments: builder.bitcast(arguments[0], raw)

    return intrinsic(bits)


bits32 = _bitcast(types.int32, types.float32, ir.IntType(32))
float32 = _bitcast(types.float32, types.int32, ir.FloatType())
bits64 = _bitcast(types.int64, types.float64, ir.IntType(64))
float64 = _bitcast(types.float64, types.int64, ir.DoubleType())


def _rounded_made(context: Any, x: Any) -> Any:
    """(n, 2**n) as float32 for the whole number n next to x, of -128 < x < 128.

    Written for the compiler, like `_parts`: numba makes 64 bits of the sum of two int32, and vectors of those are
    twice as wide as the floats beside them.
    """

    def made(c: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole, real = ir.IntType(32), ir.FloatType()
        positive = builder.fptosi(builder.fadd(arguments[0], ir.Constant(real, 128.5)), whole)  # rounds down
        n = builder.sub(positive, ir.Constant(whole, 128))
        power = builder.shl(builder.add(n, ir.Constant(whole, 127)), ir.Constant(whole, 23))
        parts = builder.sitofp(n, real), builder.bitcast(power, real)
        return c.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(types.float32, 2)(types.float32), made  # type: ignore[no-untyped-call]


_rounded: Any = intrinsic(_rounded_made)


def _parts_made(context: Any, x: Any) -> Any:
    """(n, m) as float32 with x = m * 2**n and m in [sqrt(1/2), sqrt(2)), of a normal positive x."""

    def made(c: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole, real = ir.IntType(32), ir.FloatType()
        root = ir.Constant(whole, SQRT_HALF_32)
        bits = builder.sub(builder.bitcast(arguments[0], whole), root)
        n = builder.sitofp(builder.ashr(bits, ir.Constant(whole, 23)), real)
        fraction = builder.add(builder.and_(bits, ir.Constant(whole, 0x007FFFFF)), root)
        return c.make_tuple(builder, signature.return_type, (n, builder.bitcast(fraction, real)))

    return types.UniTuple(types.float32, 2)(types.float32), made  # type: ignore[no-untyped-call]


_parts: Any = intrinsic(_parts_made)


def _wide_made(context: Any) -> Any:
    """Lets the compiler use the widest vectors there are in the function that calls this: it takes half of them."""

    def made(c: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # llvmlite lets through the attributes that it knows
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return c.get_dummy_value()

    return types.none(), made


wide: Any = intrinsic(_wide_made)


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def exp32(x: np.float32) -> np.float32:
    """e**x; 0 below -87 and capped at 88."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    m, power = _rounded(x * LOG2_E)
    r = x - m * LN2_HIGH - m * LN2_LOW
    # in pairs (Estrin): half as long a chain as one after the other, and chains are what such loops wait for
    square = r * r
    high = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    middle = np.float32(8.3334519073e-3) * r + np.float32(4.1665795894e-2)
    low = np.float32(1.6666665459e-1) * r + np.float32(5.0000001201e-1)
    p = ((high * square + middle) * square + low) * square + r + np.float32(1.0)
    return p * power  # type: ignore[no-any-return]


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def log32(x: np.float32) -> np.float32:
    """ln x of a normal positive number."""
    n, m = _parts(x)
    m = m - np.float32(1.0)  # in [-0.293, 0.414]
    square = m * m
    fourth = square * square
    p0 = np.float32(-2.4999993993e-1) * m + np.float32(3.3333331174e-1)
    p2 = np.float32(-1.6668057665e-1) * m + np.float32(2.0000714765e-1)
    p4 = np.float32(-1.2420140846e-1) * m + np.float32(1.4249322787e-1)
    p6 = np.float32(-1.1514610310e-1) * m + np.float32(1.1676998740e-1)
    p = (p2 * square + p0) + fourth * ((p6 * square + p4) + fourth * np.float32(7.0376836292e-2))
    low = p * m * square + n * LN2_LOW - np.float32(0.5) * square
    return (m + low) + n * LN2_HIGH  # type: ignore[no-any-return]


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def log64(x: np.float64) -> np.float64:
    """ln x of a normal positive number."""
    bits = bits64(x) - np.int64(SQRT_HALF_64)
    # an integer as a float without a conversion: put it under the exponent of 2**52
    n = float64(((bits >> np.int64(52)) + np.int64(2048)) | np.int64(0x4330000000000000)) - (
        4503599627370496.0 + 2048.0
    )
    m = float64((bits & np.int64(0x000FFFFFFFFFFFFF)) + np.int64(SQRT_HALF_64))
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    p = 1.0 / 17.0
    p = p * q + 1.0 / 15.0
    p = p * q + 1.0 / 13.0
    p = p * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    p = p * q + 1.0
    return 2.0 * s * p + n * LN2  # type: ignore[no-any-return]


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def gamma_logs(y: np.float64) -> tuple[np.float64, np.float64]:
    """(ln Gamma(y), its derivative) for y > 0: Stirling's series at y + 6 and six steps of the recurrence."""
    product, derivative = y, 1.0
    for k in (1.0, 2.0, 3.0, 4.0, 5.0):
        derivative = derivative * (y + k) + product
        product = product * (y + k)
    w = y + 6.0
    log_w = log64(w)
    i = 1.0 / w
    j = i * i
    series = i * (1.0 / 12.0 - j * (1.0 / 360.0 - j * (1.0 / 1260.0 - j * (1.0 / 1680.0))))
    log_gamma = (w - 0.5) * log_w - w + HALF_LOG_2PI + series - log64(product)
    slope = j * (1.0 / 12.0 - j * (1.0 / 120.0 - j * (1.0 / 252.0 - j * (1.0 / 240.0))))
    return log_gamma, log_w - 0.5 * i - slope - derivative / product


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def of_ratio(ratio: np.float32) -> tuple[np.float32, np.float32]:
    """(ln(1 + ratio), ratio / (1 + ratio)), with one division for both."""
    w = np.float32(1.0) + ratio
    inverse = np.float32(1.0) / w
    return log32(w) + (ratio - (w - np.float32(1.0))) * inverse, ratio * inverse


@njit(forceinline=True, error_model="numpy")
def apart(n: int) -> np.ndarray:
    """Memory for `n` numbers that a loop writes which also sums, far behind whatever lies before it.

    Where what a loop writes begins less than some vectors behind what it reads, as with a few dozen genes, LLVM takes
    the numbers one by one, and a sum gets other last bits: they would depend on where memory happened to be.
    """
    return np.empty(APART + n, np.float32)[APART:]


@njit(forceinline=True, error_model="numpy")
def rows_apart(n_rows: int, n: int) -> np.ndarray:
    """The same for rows of at least `n` numbers, which are as far from each other."""
    return np.empty((1 + n_rows, APART + n), np.float32)[1:]


@njit(forceinline=True, error_model="numpy")
def finite(x_G: np.ndarray) -> bool:
    """Whether no entry is infinite or not a number: by their bits, which no fast math can argue away."""
    wide()
    largest = np.int32(0)
    for g in range(len(x_G)):
        largest = max(largest, bits32(x_G[g]) & np.int32(0x7FFFFFFF))
    return bool(largest < np.int32(0x7F800000))


@njit(forceinline=True, error_model="numpy")
def ordered(bits: np.int32) -> np.int32:
    """Integers in the order of the floats of which these are the bits, and back."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
