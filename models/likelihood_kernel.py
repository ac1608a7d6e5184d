"""Softmax and negative binomial (zero-inflated or not) in one pass over the counts: value and all gradients.

Eager torch walks over (cells x genes) some forty times, and computes lgamma and digamma of zeros, which are 85
to 95 % of the counts and for which they cancel. Here every entry is first treated as a zero; the counts that are
not zero are then gathered and finished. Nearly all of those are small, and need no gamma function either: a ratio of
two, Gamma(x + theta) / (Gamma(theta) x!), is a product of x factors. All of this is vector code of float32, but for
the large counts, which are float64.

Exponentials and logarithms are those of `engine.vector_math`. Shapes: G genes of one cell; B cells.
"""

# compiled with: 1b8e897c26b8

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from scarcade.engine.vector_math import (
    SUMS,
    apart,
    bits32,
    exp32,
    float32,
    gamma_logs,
    log32,
    log64,
    of_ratio,
    ordered,
    rows_apart,
    wide,
)

CHUNK = 32  # rows whose gradients by a shared theta are added up together, whatever the number of threads
SMALL = 1024  # counts below this have their log factorial in a table
STRIP = 512  # genes that are done together, in the first cache
FEW = 6  # counts up to this are a product of so many factors; larger ones take the gamma function
LOW_THETA, HIGH_THETA = 0x1E3CE508, 0x49742400  # bits of 1e-20 and 1e6: of others a product of FEW may overflow
EPS = np.float32(1e-8)


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


LOG_FACTORIAL = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, SMALL, dtype=np.float64)))])


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
            work[s] = d * i if is_zero else i
        for s in range(n):
            total += log32(work[s])
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
