"""Softmax and negative binomial (zero-inflated or not) in one pass over the counts: value and all gradients.

Eager torch walks over (cells x genes) some forty times, and computes lgamma and digamma of zeros, which are 85
to 95 % of the counts and for which they cancel. Here every entry is first treated as a zero; the counts that are
not zero are then gathered and finished. Nearly all of those are small, and need no gamma function either: a ratio of
two, Gamma(x + theta) / (Gamma(theta) x!), is a product of x factors. All of this is vector code of float32, but for
the large counts, which are float64.

exp, log and the gamma function are written out because a call into the C library would keep the compiler from
making vector code of the loops. Theirs are the flags "contract" alone: full fast math would rearrange their
error terms. "numpy" as error model leaves out the test for a zero divisor, which has the same effect as a call.
Numba's cache goes by what is in a function's own file. So whatever is compiled with functions of another file has a
line that changes with that one: ``# compiled with: ...``, which tests/models/test_compiled_with.py looks after.
Whatever is called from a cached function is forced inline: a callee of its own would run as it was compiled alone
where the code is fresh, and as it was optimised within its caller where it comes from the cache, with other bits.

Errors (tests/models/test_likelihood_kernel.py): float32 functions 2 units in the last place, float64 ones 1e-10.
Shapes: G genes of one cell; B cells.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

CHUNK = 32  # rows whose gradients by a shared theta are added up together, whatever the number of threads
SMALL = 1024  # counts below this have their log factorial in a table
STRIP = 512  # genes that are done together, in the first cache
APART = 256  # numbers: more than any loop takes in one turn
FEW = 6  # counts up to this are a product of so many factors; larger ones take the gamma function
LOW_THETA, HIGH_THETA = 0x1E3CE508, 0x49742400  # bits of 1e-20 and 1e6: of others a product of FEW may overflow
EPS = np.float32(1e-8)
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


def _float_of_made(context: Any, x: Any) -> Any:
    """The float32 of a bfloat16 that comes as int16; a float32 stays as it is."""

    def made(c: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        whole = ir.IntType(32)
        high = builder.shl(builder.zext(arguments[0], whole), ir.Constant(whole, 16))
        return builder.bitcast(high, ir.FloatType())

    return types.float32(x), made


_float_of: Any = intrinsic(_float_of_made)


def _stored_made(context: Any, x: Any, like: Any) -> Any:
    """The bfloat16 next to a float32, as int16, if that is what `like` is; else the float32."""

    def made(c: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[1] == types.float32:
            return arguments[0]
        whole = ir.IntType(32)
        bits = builder.bitcast(arguments[0], whole)
        odd = builder.and_(builder.lshr(bits, ir.Constant(whole, 16)), ir.Constant(whole, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(whole, 0x7FFF)))
        # what is not a number would round to another one
        nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        kept = builder.select(nan, ir.Constant(whole, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(kept, ir.Constant(whole, 16)), ir.IntType(16))

    return like(x, like), made


_stored: Any = intrinsic(_stored_made)


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
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    return p * power  # type: ignore[no-any-return]


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def log32(x: np.float32) -> np.float32:
    """ln x of a normal positive number."""
    n, m = _parts(x)
    m = m - np.float32(1.0)  # in [-0.293, 0.414]
    p = np.float32(7.0376836292e-2)
    p = p * m + np.float32(-1.1514610310e-1)
    p = p * m + np.float32(1.1676998740e-1)
    p = p * m + np.float32(-1.2420140846e-1)
    p = p * m + np.float32(1.4249322787e-1)
    p = p * m + np.float32(-1.6668057665e-1)
    p = p * m + np.float32(2.0000714765e-1)
    p = p * m + np.float32(-2.4999993993e-1)
    p = p * m + np.float32(3.3333331174e-1)
    square = m * m
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


LOG_FACTORIAL = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, SMALL, dtype=np.float64)))])


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


@njit(forceinline=True, error_model="numpy")
def _widen(given_G: np.ndarray, bias_G: np.ndarray, out_G: np.ndarray) -> tuple[bool, np.float32]:
    """float32 of bfloat16 (as int16), or of float32, and the bias. Returns whether all are finite, and the highest."""
    wide()
    largest, highest = np.int32(0), np.int32(-0x7FFFFFFF)
    for g in range(len(given_G)):
        number = _float_of(given_G[g]) + bias_G[g]
        bits = bits32(number)
        largest = max(largest, bits & np.int32(0x7FFFFFFF))
        highest = max(highest, ordered(bits))
        out_G[g] = number
    return bool(largest < np.int32(0x7F800000)), float32(ordered(highest))


@njit(forceinline=True, error_model="numpy")
def _narrow(weight: np.float32, given_G: np.ndarray, out_G: np.ndarray) -> None:
    """The inverse, times `weight`: rounded to the nearest, if `out_G` is bfloat16."""
    wide()
    for g in range(len(given_G)):
        out_G[g] = _stored(weight * given_G[g], out_G[g])


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def exponentials(logits_G: np.ndarray, highest: np.float32, out_G: np.ndarray) -> np.float32:
    """exp(logits - highest), and the sum."""
    wide()
    total = np.float32(0.0)
    for g in range(len(logits_G)):
        e = exp32(logits_G[g] - highest)
        out_G[g] = e
        total += e
    return total


@njit(forceinline=True, error_model="numpy")
def inverses(theta_G: np.ndarray, out_G: np.ndarray) -> tuple[bool, bool]:
    """1 / (theta + EPS). Returns whether all theta are finite, and whether `_few` can take all of them."""
    wide()
    lowest, highest = np.int32(0x7FFFFFFF), np.int32(0)
    for g in range(len(theta_G)):
        bits = bits32(theta_G[g])
        lowest, highest = min(lowest, bits), max(highest, bits & np.int32(0x7FFFFFFF))
        out_G[g] = np.float32(1.0) / (theta_G[g] + EPS)
    usual = (lowest >= np.int32(LOW_THETA)) & (highest <= np.int32(HIGH_THETA))
    return bool(highest < np.int32(0x7F800000)), bool(usual)


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def of_ratio(ratio: np.float32) -> tuple[np.float32, np.float32]:
    """(ln(1 + ratio), ratio / (1 + ratio)), with one division for both."""
    w = np.float32(1.0) + ratio
    inverse = np.float32(1.0) / w
    return log32(w) + (ratio - (w - np.float32(1.0))) * inverse, ratio * inverse


@njit(forceinline=True, error_model="numpy")
def _copy(from_N, first, to_S) -> None:  # type: ignore[no-untyped-def]
    wide()
    for s in range(len(to_S)):
        to_S[s] = from_N[first + s]


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def nb_as_zero(factor, e_G, theta_G, inverse_G, t_G, d_theta_G, work) -> np.float64:  # type: ignore[no-untyped-def]
    """Every count as if it were 0, of the rate factor * e: writes rate * d/d rate and d/d log theta; returns log p.

    Strip by strip, in the first cache, in loops that each have few arrays: with more than a handful LLVM makes no
    vector code, as it would have to compare all of them for overlaps when it runs. What goes from loop to loop lies in
    one array, `work`, at places a constant apart, which need no comparing.
    """
    wide()
    total = np.float32(0.0)
    for first in range(0, len(e_G), STRIP):
        end = min(first + STRIP, len(e_G))
        e_S, theta_S, inverse_S = e_G[first:end], theta_G[first:end], inverse_G[first:end]
        for s in range(end - first):
            theta, inverse = theta_S[s], inverse_S[s]
            log_ratio, share = of_ratio(factor * e_S[s] * inverse)
            total -= theta * log_ratio
            work[s] = -theta * share
            work[STRIP + s] = theta * (theta * inverse * share - log_ratio)
        _copy(work, 0, t_G[first:end])
        _copy(work, STRIP, d_theta_G[first:end])
    return np.float64(total)


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def zinb_as_zero(  # type: ignore[no-untyped-def]
    there_G, factor, e_G, theta_G, inverse_G, dropout_G, t_G, d_theta_G, d_dropout_G, work
) -> np.float64:
    """As `nb_as_zero`, with the gradient by the dropout logits, which is final for all counts.

    A count that is not 0 (`there_G` is 1) adds log(1 - sigmoid(dropout)) and the log p of an nb's zero; the rest is of
    `_few` and `_many`.
    """
    wide()
    zero, one = np.float32(0.0), np.float32(1.0)
    total = zero
    for first in range(0, len(e_G), STRIP):
        end = min(first + STRIP, len(e_G))
        n = end - first
        there_S, e_S, dropout_S = there_G[first:end], e_G[first:end], dropout_G[first:end]
        theta_S, inverse_S = theta_G[first:end], inverse_G[first:end]
        for s in range(n):
            theta, inverse = theta_S[s], inverse_S[s]
            log_ratio, share = of_ratio(factor * e_S[s] * inverse)
            work[s] = -theta * log_ratio
            work[STRIP + s] = -theta * share
            work[3 * STRIP + s] = theta * (theta * inverse * share - log_ratio)
        for s in range(n):
            pi = dropout_S[s]
            work[2 * STRIP + s] = exp32(-abs(pi))
            work[4 * STRIP + s] = exp32(-abs(work[s] - pi))
        for s in range(n):
            log_nb, pi = work[s], dropout_S[s]
            e, d = one + work[2 * STRIP + s], one + work[4 * STRIP + s]
            both = one / (e * d)
            i, j = d * both, e * both  # 1 / e and 1 / d
            extra = i if pi >= zero else one - i  # sigmoid(pi)
            from_nb = j if log_nb >= pi else one - j  # probability that a zero comes from the negative binomial
            is_zero = there_S[s] == zero
            work[STRIP + s] *= from_nb
            work[3 * STRIP + s] *= from_nb
            work[4 * STRIP + s] = (one - extra - from_nb) if is_zero else -extra
            # log(e^pi + e^log_nb) - log(1 + e^pi), or log_nb - log(1 + e^pi)
            total += (max(pi, log_nb) if is_zero else log_nb) - max(pi, zero)
            total += log32(d * i if is_zero else i)
        _copy(work, STRIP, t_G[first:end])
        _copy(work, 3 * STRIP, d_theta_G[first:end])
        _copy(work, 4 * STRIP, d_dropout_G[first:end])
    return np.float64(total)


@njit(forceinline=True, error_model="numpy")
def _sorted_out(genes, counts, usual, places_2G, counts_2G):  # type: ignore[no-untyped-def]
    """Puts whole numbers up to `FEW` and the other counts, with their genes, in two rows; returns how many are in each.

    Without a branch, which would be mispredicted. All are among the others if theta is not `usual`. A zero that was
    kept is neither; what is not a number is among the others.
    """
    few, many = 0, 0
    for k in range(len(genes)):
        gene, x = genes[k], counts[k]
        there = not x < EPS
        small = there & usual & (x <= np.float32(FEW)) & (np.float32(np.int32(min(x, np.float32(FEW)))) == x)
        places_2G[0, few] = places_2G[1, many] = gene
        counts_2G[0, few] = counts_2G[1, many] = x
        few += small
        many += there & (not small)
    return few, many


@njit(forceinline=True, error_model="numpy")
def _log_factorial(x: np.float64, table: np.ndarray) -> np.float64:
    """ln x!, of a count or of any number that is not negative."""
    k = np.int64(x) if x < SMALL else 0
    return table[k] if np.float64(k) == x else gamma_logs(x + 1.0)[0]


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _few(places, counts, factor, e_G, theta_G, t_G, d_theta_G, work) -> np.float64:  # type: ignore[no-untyped-def]
    """Sets the gradients of the counts 1, 2, ... `FEW` at `places`, and returns the sum of their log p.

    Less what they have of `nb_as_zero`, -theta ln(1 + rate / theta). The rest is x ln(rate / (theta + rate)) and the
    logarithm of the product over k < x of (theta + k) / (k + 1), whose derivative by theta is found beside it.
    Differences of nearly equal numbers are multiplied out: theta may be large.
    """
    wide()
    n = len(places)
    one = np.float32(1.0)
    for i in range(n):
        g = places[i]
        work[0, i] = theta_G[g]
        work[1, i] = factor * e_G[g]
    total = np.float32(0.0)
    for i in range(n):
        x, theta, rate = counts[i], work[0, i], work[1, i]
        base = theta + EPS
        inverse, by_sum, rate_eps = one / base, one / (base + rate), rate + EPS
        product, derivative = theta, one  # of x = 1
        for k in range(1, FEW):
            scale = np.float32(1.0 / (k + 1.0))
            factor_k = theta + np.float32(k)
            more = x > np.float32(k)
            derivative = (derivative * factor_k + product) * scale if more else derivative
            product = product * factor_k * scale if more else product
        total += x * log32(rate_eps * by_sum) + log32(product)
        log_ratio, _ = of_ratio(rate * inverse)
        work[0, i] = x * (rate / rate_eps) - rate * (x + theta) * by_sum
        work[1, i] = theta * ((theta * inverse * rate - x) * by_sum + (derivative / product - log_ratio))
    for i in range(n):
        t_G[places[i]] = work[0, i]
        d_theta_G[places[i]] = work[1, i]
    return np.float64(total)


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _many(places, counts, factor, e_G, theta_G, table, t_G, d_theta_G) -> np.float64:  # type: ignore[no-untyped-def]
    """As `_few`, of any numbers, in float64."""
    total = 0.0
    for i in range(len(places)):
        g = places[i]
        x, theta, rate = np.float64(counts[i]), np.float64(theta_G[g]), np.float64(factor * e_G[g])
        base = theta + 1e-8
        all_sum = base + rate
        log_gamma, digamma = gamma_logs(x + theta)
        log_gamma_0, digamma_0 = gamma_logs(theta)
        total += x * log64((rate + 1e-8) / all_sum) + log_gamma - log_gamma_0 - _log_factorial(x, table)
        slope = (theta / base * rate - x) / all_sum - log64(1.0 + rate / base) + digamma - digamma_0
        t_G[g] = np.float32(rate * (x / (rate + 1e-8) - (x + theta) / all_sum))
        d_theta_G[g] = np.float32(theta * slope)
    return total  # type: ignore[return-value]


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def finish(inverse_total, e_G, t_G) -> np.float32:  # type: ignore[no-untyped-def]
    """rate * d/d rate -> d/d logits through the softmax, in place; returns d/d log library."""
    wide()
    total = np.float32(0.0)
    for g in range(len(t_G)):
        total += t_G[g]
    share = total * inverse_total
    for g in range(len(t_G)):
        t_G[g] -= e_G[g] * share
    return total


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _add(weight, from_G, to_G) -> None:  # type: ignore[no-untyped-def]
    wide()
    for g in range(len(from_G)):
        to_G[g] += weight * from_G[g]


@njit(forceinline=True, error_model="numpy")
def mark(genes, counts, there_G) -> None:  # type: ignore[no-untyped-def]
    """1 where there is a count that is not 0; until then all are 0."""
    for k in range(len(genes)):
        there_G[genes[k]] = np.float32(not counts[k] < EPS)


@njit(forceinline=True, error_model="numpy")
def clear(genes, there_G) -> None:  # type: ignore[no-untyped-def]
    """All 0 again."""
    for k in range(len(genes)):
        there_G[genes[k]] = np.float32(0.0)


@njit(inline="always", error_model="numpy")
def _row(  # type: ignore[no-untyped-def]
    genes, counts, highest, log_library, theta_G, inverse_G, usual, pi_G, table, e_G, there_G, t_G, d_theta_G, d_pi_G,
    places_2G, counts_2G, work_S, work_2G,
):  # fmt: skip
    """(log p, d/d log library) of one cell with the logits `t_G`, which become their gradients.

    Those by log theta and dropout logits come in `d_theta_G` and `d_pi_G`.
    """
    inverse_total = np.float32(1.0) / exponentials(t_G, highest, e_G)
    factor = np.float32(np.exp(np.float64(log_library))) * inverse_total
    if len(pi_G) > 0:
        mark(genes, counts, there_G)
        value = zinb_as_zero(there_G, factor, e_G, theta_G, inverse_G, pi_G, t_G, d_theta_G, d_pi_G, work_S)
        clear(genes, there_G)
    else:
        value = nb_as_zero(factor, e_G, theta_G, inverse_G, t_G, d_theta_G, work_S)
    few, many = _sorted_out(genes, counts, usual, places_2G, counts_2G)
    value += _few(places_2G[0, :few], counts_2G[0, :few], factor, e_G, theta_G, t_G, d_theta_G, work_2G)
    value += _many(places_2G[1, :many], counts_2G[1, :many], factor, e_G, theta_G, table, t_G, d_theta_G)
    return value, finish(inverse_total, e_G, t_G)


@njit(inline="always", error_model="numpy")
def rows_in(  # type: ignore[no-untyped-def]
    memory,
    start, stop, chunk, indptr, genes, counts, logits_BG, bias, bias_code_B, log_library_B, theta, code_B, dropout_BG,
    more, more_code_B, weight_B, table, value_B, d_library_B, d_theta, d_bias, d_more,
) -> None:  # fmt: skip
    """As `rows`, in the arrays of `memory`, for G genes: float32 unless told, and G numbers where nothing is told.

    (e: `apart`; t; dropout logits, and their gradient, (0,) without; 1 / theta; the gradient by theta; zeros; int32 (2,
    counts + 1) and as many float32, for the counts of a cell that has most of them; 5 `STRIP`: `apart`; 2 rows as long
    as that: `rows_apart`).
    """
    n_more, shared = dropout_BG.shape[1], len(theta) == 1
    e_G, t_G, pi_G, d_pi_G, inverse_G, row_theta_G, there_G, places_2G, counts_2G, work_S, work_2G = memory
    theta_is_finite, usual = inverses(theta[0], inverse_G) if shared else (True, True)
    for b in range(start, stop):
        theta_G = theta[code_B[b]]
        if not shared:
            theta_is_finite, usual = inverses(theta_G, inverse_G)
        sound, highest = _widen(logits_BG[b], bias[bias_code_B[b]], t_G)
        if n_more > 0:
            sound &= _widen(dropout_BG[b], more[more_code_B[b]], pi_G)[0]
        sound &= theta_is_finite and log_library_B[b] < 88  # an empty cell has -inf
        d_theta_G = row_theta_G if shared else d_theta[b]
        if sound:
            value_B[b], d_library_B[b] = _row(
                genes[indptr[b] : indptr[b + 1]], counts[indptr[b] : indptr[b + 1]], highest, log_library_B[b],
                theta_G, inverse_G, usual, pi_G, table, e_G, there_G, t_G, d_theta_G, d_pi_G, places_2G, counts_2G,
                work_S, work_2G,
            )  # fmt: skip
        else:  # the code above assumes finite numbers, and would make up a fine loss
            value_B[b] = d_library_B[b] = np.nan
            t_G[:] = np.nan
            d_pi_G[:] = np.nan
            d_theta_G[:] = np.nan
        _narrow(weight_B[b], t_G, logits_BG[b])
        at = chunk + b // CHUNK
        if shared:
            _add(weight_B[b], row_theta_G, d_theta[at])
        else:
            _narrow(weight_B[b], d_theta_G, d_theta_G)
        if len(bias) == 1:
            _add(weight_B[b], t_G, d_bias[at])
        if n_more > 0:
            _narrow(weight_B[b], d_pi_G, dropout_BG[b])
            if len(more) == 1:
                _add(weight_B[b], d_pi_G, d_more[at])


@njit(nogil=True, cache=True, error_model="numpy")
def rows(  # type: ignore[no-untyped-def]
    start, stop, chunk, indptr, genes, counts, logits_BG, bias, bias_code_B, log_library_B, theta, code_B, dropout_BG,
    more, more_code_B, weight_B, table, value_B, d_library_B, d_theta, d_bias, d_more,
) -> None:  # fmt: skip
    """Rows [start, stop) of log p, with the gradients by logits and dropout logits in the place of these.

    The counts of row b that are not zero are those from `indptr[b]` to `indptr[b + 1]`. Logits come without their
    biases, which are rows of `bias` and `more`, as float32 or bfloat16 (as int16), and leave as their gradients.
    `code_B` says which row of theta (K, G) is a cell's. `dropout_BG` is (B, 0) for the plain negative binomial. Rows
    are those of a block, whose first chunk is `chunk`. All gradients but `d_library_B` are times `weight_B`. Those of
    what all cells share (theta, biases: tables of one row) are summed in (chunks of the batch, G); `d_theta` is (B, G)
    if there are several, and of biases there are none.
    """
    n_genes, n_more = logits_BG.shape[1], dropout_BG.shape[1]
    longest = 0
    for b in range(start, stop):
        longest = max(longest, indptr[b + 1] - indptr[b])
    memory = (
        apart(n_genes), np.empty(n_genes, np.float32), np.empty(n_more, np.float32), np.empty(n_more, np.float32),
        np.empty(n_genes, np.float32), np.empty(n_genes, np.float32), np.zeros(n_genes, np.float32),
        np.empty((2, longest + 1), np.int32), np.empty((2, longest + 1), np.float32),
        apart(5 * STRIP), rows_apart(2, longest),
    )  # fmt: skip
    rows_in(
        memory, start, stop, chunk, indptr, genes, counts, logits_BG, bias, bias_code_B, log_library_B, theta, code_B,
        dropout_BG, more, more_code_B, weight_B, table, value_B, d_library_B, d_theta, d_bias, d_more,
    )  # fmt: skip
