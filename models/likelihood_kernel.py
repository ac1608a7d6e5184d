"""Softmax and negative binomial (zero-inflated or not) in one pass over the counts: value and all gradients.

Eager torch walks over (cells x genes) some forty times, and computes lgamma and digamma of zeros, which are 85
to 95 % of the counts and for which they cancel. Here every entry is first treated as a zero, in vector code;
the counts that are not zero are then gathered and finished in float64. Nearly all of those are small, and need
no gamma function either: a ratio of two, Gamma(x + theta) / (Gamma(theta) x!), is a product of x factors.

exp, log and the gamma function are written out because a call into the C library would keep the compiler from
making vector code of the loops. Theirs are the flags "contract" alone: full fast math would rearrange their
error terms. "numpy" as error model leaves out the test for a zero divisor, which has the same effect as a call.
All compiled code of the likelihood is in this one file because numba's cache notices changes of a function's own
file only. `mmd_kernel` takes `exp32` from here: after a change of that, save that file anew (`touch`), too.
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
FEW = 6  # counts up to this are a product of so many factors; larger ones take the gamma function
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


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def exp32(x: np.float32) -> np.float32:
    """e**x; 0 below -87 and capped at 88."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.int32(x * LOG2_E + np.float32(128.5)) - np.int32(128)  # the nearest integer: what is cut off is positive
    m = np.float32(n)
    r = x - m * LN2_HIGH - m * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    return p * float32((n + np.int32(127)) << np.int32(23))  # type: ignore[no-any-return]


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def log32(x: np.float32) -> np.float32:
    """ln x of a normal positive number."""
    bits = bits32(x) - np.int32(SQRT_HALF_32)
    n = np.float32(bits >> np.int32(23))
    m = float32((bits & np.int32(0x007FFFFF)) + np.int32(SQRT_HALF_32)) - np.float32(1.0)  # in [-0.293, 0.414]
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
def log1p32(x: np.float32) -> np.float32:
    """ln(1 + x) for x >= 0; what 1 + x loses is added back."""
    w = np.float32(1.0) + x
    return log32(w) + (x - (w - np.float32(1.0))) / w


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
def _finite(x_G: np.ndarray) -> bool:
    """Whether no entry is infinite or not a number: by their bits, which no fast math can argue away."""
    largest = np.int32(0)
    for g in range(len(x_G)):
        largest = max(largest, bits32(x_G[g]) & np.int32(0x7FFFFFFF))
    return bool(largest < np.int32(0x7F800000))


@njit(forceinline=True, error_model="numpy")
def _highest(x_G: np.ndarray) -> np.float32:
    """The largest of finite numbers, as the largest of integers in the same order: of floats it is no vector code."""
    found = np.int32(-0x7FFFFFFF)
    for g in range(len(x_G)):
        bits = bits32(x_G[g])
        found = max(found, bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return float32(found ^ ((found >> np.int32(31)) & np.int32(0x7FFFFFFF)))  # type: ignore[no-any-return]


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _softmax(logits_G: np.ndarray, out_G: np.ndarray) -> None:
    highest = _highest(logits_G)
    total = np.float32(0.0)
    for g in range(len(logits_G)):
        e = exp32(logits_G[g] - highest)
        out_G[g] = e
        total += e
    scale = np.float32(1.0) / total
    for g in range(len(logits_G)):
        out_G[g] *= scale


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _nb_as_zero(x_G, library, scale_G, theta_G, t_G, d_theta_G, log_ratio_G) -> np.float64:  # type: ignore[no-untyped-def]
    """Every count as if it were 0: writes rate * d/d rate and d/d log theta; returns log p of those that are.

    For the others it writes ln(1 + rate / theta).
    """
    total = np.float32(0.0)
    for g in range(len(scale_G)):
        theta = theta_G[g]
        base = theta + EPS
        rate = library * scale_G[g]
        log_ratio = log1p32(rate / base)
        share = rate / (base + rate)
        total -= theta * log_ratio if x_G[g] < EPS else np.float32(0.0)
        t_G[g] = -theta * share
        d_theta_G[g] = theta * (theta / base * share - log_ratio)
        log_ratio_G[g] = log_ratio
    return np.float64(total)


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _zinb_as_zero(  # type: ignore[no-untyped-def]
    x_G, library, scale_G, theta_G, dropout_G, t_G, d_theta_G, d_dropout_G, log_ratio_G
) -> np.float64:
    """As `_nb_as_zero`, with the gradient by the dropout logits, which is final for all counts.

    For a count that is not 0 the sum has log(1 - sigmoid(dropout)) alone; the rest is added by `_few` and `_many`.
    """
    zero, one = np.float32(0.0), np.float32(1.0)
    total = zero
    for g in range(len(scale_G)):
        theta = theta_G[g]
        base = theta + EPS
        rate = library * scale_G[g]
        log_ratio = log1p32(rate / base)
        share = rate / (base + rate)
        log_nb = -theta * log_ratio
        pi = dropout_G[g]
        e = exp32(-abs(pi))
        i = one / (one + e)
        extra = i if pi >= zero else e * i  # sigmoid(pi)
        d = exp32(-abs(log_nb - pi))
        j = one / (one + d)
        from_nb = j if log_nb >= pi else d * j  # probability that a zero comes from the negative binomial
        is_zero = x_G[g] < EPS
        # log(e^pi + e^log_nb) - log(1 + e^pi), or -log(1 + e^pi)
        total += (max(pi, log_nb) if is_zero else zero) - max(pi, zero) + log32((one + d) * i if is_zero else i)
        t_G[g] = -from_nb * theta * share
        d_theta_G[g] = from_nb * theta * (theta / base * share - log_ratio)
        d_dropout_G[g] = (one - extra - from_nb) if is_zero else -extra
        log_ratio_G[g] = log_ratio
    return np.float64(total)


@njit(forceinline=True, error_model="numpy")
def _find(x_G, few_G, many_G):  # type: ignore[no-untyped-def]
    """Places of the counts that are not zero, and how many there are: whole numbers up to `FEW`, and the others.

    Without a branch, which would be mispredicted.
    """
    few, many = 0, 0
    for g in range(len(x_G)):
        x = x_G[g]
        small = (x <= np.float32(FEW)) & (np.float32(np.int32(x)) == x)
        few_G[few] = many_G[many] = g
        few += (x >= EPS) & small
        many += (x >= EPS) & (not small)
    return few, many


@njit(forceinline=True, error_model="numpy")
def _log_factorial(x: np.float64, table: np.ndarray) -> np.float64:
    """ln x!, of a count or of any number that is not negative."""
    k = np.int64(x) if x < SMALL else 0
    return table[k] if np.float64(k) == x else gamma_logs(x + 1.0)[0]


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _few(places, x_G, library, scale_G, theta_G, log_ratio_G, t_G, d_theta_G, work) -> np.float64:  # type: ignore[no-untyped-def]
    """Sets the gradients of the counts 1, 2, ... `FEW` at `places`, and returns the sum of their log p.

    With q = rate / (theta + rate), log p = -theta ln(1 + rate / theta) + ln of the product over k < x of
    q (theta + k) / (k + 1), whose derivative by theta is found beside it.
    """
    n = len(places)
    for i in range(n):
        g = places[i]
        work[0, i] = np.float64(x_G[g])
        work[1, i] = np.float64(theta_G[g])
        work[2, i] = np.float64(library * scale_G[g])
        work[3, i] = np.float64(log_ratio_G[g])
    total = 0.0
    for i in range(n):
        x, theta, rate, log_ratio = work[0, i], work[1, i], work[2, i], work[3, i]
        base = theta + 1e-8
        one_by_sum = 1.0 / (base + rate)
        q = (rate + 1e-8) * one_by_sum
        product, derivative = q * theta, q  # of x = 1
        for k in range(1, FEW):
            scale = q * (1.0 / (k + 1.0))
            factor = theta + k
            more = x > k
            derivative = (derivative * factor + product) * scale if more else derivative
            product = product * factor * scale if more else product
        total += log64(product) - theta * log_ratio
        work[4, i] = rate * (x / (rate + 1e-8) - (x + theta) * one_by_sum)
        work[5, i] = theta * (theta / base - (theta + x) * one_by_sum - log_ratio + derivative / product)
    for i in range(n):
        t_G[places[i]] = np.float32(work[4, i])
        d_theta_G[places[i]] = np.float32(work[5, i])
    return total  # type: ignore[return-value]


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _many(places, x_G, library, scale_G, theta_G, log_ratio_G, table, t_G, d_theta_G) -> np.float64:  # type: ignore[no-untyped-def]
    """As `_few`, of any numbers."""
    total = 0.0
    for i in range(len(places)):
        g = places[i]
        x, theta, rate = np.float64(x_G[g]), np.float64(theta_G[g]), np.float64(library * scale_G[g])
        base = theta + 1e-8
        all_sum = base + rate
        log_ratio = np.float64(log_ratio_G[g])
        log_gamma, digamma = gamma_logs(x + theta)
        log_gamma_0, digamma_0 = gamma_logs(theta)
        total += x * log64((rate + 1e-8) / all_sum) - theta * log_ratio + log_gamma - log_gamma_0
        total -= _log_factorial(x, table)
        t_G[g] = np.float32(rate * (x / (rate + 1e-8) - (x + theta) / all_sum))
        d_theta_G[g] = np.float32(theta * (theta / base - (theta + x) / all_sum - log_ratio + digamma - digamma_0))
    return total  # type: ignore[return-value]


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _finish(scale_G, t_G) -> np.float32:  # type: ignore[no-untyped-def]
    """rate * d/d rate -> d/d logits through the softmax, in place; returns d/d log library."""
    total = np.float32(0.0)
    for g in range(len(t_G)):
        total += t_G[g]
    for g in range(len(t_G)):
        t_G[g] -= scale_G[g] * total
    return total


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _add(weight, from_G, to_G) -> None:  # type: ignore[no-untyped-def]
    for g in range(len(from_G)):
        to_G[g] += weight * from_G[g]


@njit(nogil=True, cache=True, error_model="numpy")
def rows(  # type: ignore[no-untyped-def]
    start, stop, x_BG, logits_BG, log_library_B, theta, code_B, dropout_BG, weight_B, table,
    value_B, d_logits_BG, d_library_B, d_theta, d_dropout_BG,
) -> None:  # fmt: skip
    """Rows [start, stop). `code_B` says which row of theta (K, G) is a cell's. If there is one for all of them,
    `d_theta` (chunks, G) sums its gradients by weight; else `d_theta` is (B, G). `dropout_BG` is (0, 0) for the plain
    negative binomial.
    """
    n_genes = x_BG.shape[1]
    shared, zinb = len(theta) == 1, dropout_BG.shape[0] > 0
    scale_G = np.empty(n_genes, np.float32)
    log_ratio_G = np.empty(n_genes, np.float32)
    few_G, many_G = np.empty(n_genes + 1, np.int32), np.empty(n_genes + 1, np.int32)
    row_theta_G = np.empty(n_genes, np.float32)
    work = np.empty((6, n_genes))
    theta_is_finite = _finite(theta[0]) if shared else True
    for b in range(start, stop):
        theta_G = theta[code_B[b]]
        sound = theta_is_finite and log_library_B[b] < 88 and _finite(logits_BG[b])  # an empty cell has -inf
        sound = sound and (shared or _finite(theta_G)) and (not zinb or _finite(dropout_BG[b]))
        if not sound:  # the code below assumes finite numbers, and would make up a fine loss
            value_B[b] = d_library_B[b] = np.nan
            d_logits_BG[b] = np.nan
            d_theta[b // CHUNK if shared else b] = np.nan
            if zinb:
                d_dropout_BG[b] = np.nan
            continue
        x_G, t_G = x_BG[b], d_logits_BG[b]
        library = np.float32(np.exp(np.float64(log_library_B[b])))
        d_theta_G = row_theta_G if shared else d_theta[b]
        _softmax(logits_BG[b], scale_G)
        if zinb:
            value = _zinb_as_zero(
                x_G, library, scale_G, theta_G, dropout_BG[b], t_G, d_theta_G, d_dropout_BG[b], log_ratio_G
            )
        else:
            value = _nb_as_zero(x_G, library, scale_G, theta_G, t_G, d_theta_G, log_ratio_G)
        few, many = _find(x_G, few_G, many_G)
        value += _few(few_G[:few], x_G, library, scale_G, theta_G, log_ratio_G, t_G, d_theta_G, work)
        value += _many(many_G[:many], x_G, library, scale_G, theta_G, log_ratio_G, table, t_G, d_theta_G)
        value_B[b] = value
        d_library_B[b] = _finish(scale_G, t_G)
        if shared:
            _add(weight_B[b], row_theta_G, d_theta[b // CHUNK])
