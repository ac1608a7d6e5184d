"""The negative binomial likelihood of a decoder that is frozen, compiled: what surgery needs of it, and no more.

As `likelihood_kernel`, with three things left out that do not change while a reference is frozen. Theta has no
gradient. What is of the counts and theta alone, lnGamma(x + theta) - lnGamma(theta) - ln x!, is a number of each cell
that is known before; so a count that is not zero costs a logarithm, where it costs two gamma functions and their
derivatives otherwise. And counts stay sparse: nobody looks at the zeros to find out that they are zero.

Gradients are written over the logits. The functions are those of `likelihood_kernel`: after a change there save this
file anew (`touch`), because numba's cache notices changes of a function's own file only. Shapes: B cells, G genes.
"""

import numpy as np
from numba import njit

from scarcade.models.likelihood_kernel import EPS, SUMS, _exponentials, _finite, _highest, _wide, exp32, log32, of_ratio


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _nb_zeros(factor, e_G, theta_G, inverse_G, t_G):  # type: ignore[no-untyped-def]
    """Every count as if it were 0: writes rate * d/d rate; returns the sums of log p and of what was written."""
    _wide()
    value, slope = np.float32(0.0), np.float32(0.0)
    for g in range(len(e_G)):
        ratio = factor * e_G[g] * inverse_G[g]  # rate / (theta + eps)
        theta = theta_G[g]
        log_ratio, share = of_ratio(ratio)
        t = -theta * share
        value -= theta * log_ratio
        t_G[g] = t
        slope += t
    return value, slope


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _zinb_zeros(factor, e_G, theta_G, inverse_G, there_G, dropout_G, t_G):  # type: ignore[no-untyped-def]
    """As `_nb_zeros`, with the final gradient by the dropout logits, written over them.

    Counts that are not 0 (`there_G` is 1) add log(1 - sigmoid(dropout)) and the log p of an nb's zero.
    """
    _wide()
    zero, one = np.float32(0.0), np.float32(1.0)
    value, slope = zero, zero
    for g in range(len(e_G)):
        ratio = factor * e_G[g] * inverse_G[g]
        theta = theta_G[g]
        log_ratio, share = of_ratio(ratio)
        log_nb = -theta * log_ratio
        pi = dropout_G[g]
        e = exp32(-abs(pi))
        i = one / (one + e)
        extra = i if pi >= zero else e * i  # sigmoid(pi)
        d = exp32(-abs(log_nb - pi))
        j = one / (one + d)
        from_nb = j if log_nb >= pi else d * j  # probability that a zero comes from the negative binomial
        is_zero = there_G[g] == zero
        value += (max(pi, log_nb) if is_zero else log_nb) - max(pi, zero) + log32((one + d) * i if is_zero else i)
        t = -(from_nb if is_zero else one) * theta * share
        t_G[g] = t
        slope += t
        dropout_G[g] = (one - extra - from_nb) if is_zero else -extra
    return value, slope


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _counts(places, x_N, factor, e_G, theta_G, t_G, work):  # type: ignore[no-untyped-def]
    """What counts that are not zero add: sets their gradients; returns the sums of log p and of the change.

    They are gathered first, so that the arithmetic is vector code.
    """
    _wide()
    n = len(places)
    for k in range(n):
        g = places[k]
        work[0, k] = np.float32(x_N[k])
        work[1, k] = factor * e_G[g]
        work[2, k] = theta_G[g]
        work[3, k] = t_G[g]
    value, slope = np.float32(0.0), np.float32(0.0)
    for k in range(n):
        x, rate, theta = work[0, k], work[1, k], work[2, k]
        one_by_sum = np.float32(1.0) / (theta + EPS + rate)
        rate_eps = rate + EPS
        value += x * log32(rate_eps * one_by_sum)
        t = x * (rate / rate_eps) - rate * (x + theta) * one_by_sum
        slope += t - work[3, k]
        work[3, k] = t
    for k in range(n):
        t_G[places[k]] = work[3, k]
    return value, slope


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _through_softmax(e_G, inverse_total, slope, t_G) -> None:  # type: ignore[no-untyped-def]
    _wide()
    factor = inverse_total * slope
    for g in range(len(e_G)):
        t_G[g] -= e_G[g] * factor


@njit(nogil=True, cache=True, error_model="numpy")
def rows(  # type: ignore[no-untyped-def]
    start, stop, indptr, genes, counts, logits_BG, dropout_BG, library_B, constant_B, theta_G, value_B
) -> None:
    """Rows [start, stop): log p of each cell, and its gradients by the logits (and dropout logits) in their place.

    `dropout_BG` is (0, 0) for the plain negative binomial. `constant_B` is what the counts and theta alone give.
    """
    n_genes = logits_BG.shape[1]
    zinb = dropout_BG.shape[0] > 0
    e_G, there_G = np.empty(n_genes, np.float32), np.zeros(n_genes, np.float32)
    inverse_G = np.float32(1.0) / (theta_G + EPS)
    work = np.empty((4, n_genes), np.float32)
    theta_is_finite = _finite(theta_G)
    for b in range(start, stop):
        t_G = logits_BG[b]
        sound = theta_is_finite and library_B[b] < np.float32(1e38) and _finite(t_G)
        if not (sound and (not zinb or _finite(dropout_BG[b]))):  # the code below assumes finite numbers
            value_B[b] = np.nan
            t_G[:] = np.nan
            if zinb:
                dropout_BG[b] = np.nan
            continue
        places, x_N = genes[indptr[b] : indptr[b + 1]], counts[indptr[b] : indptr[b + 1]]
        total = _exponentials(t_G, _highest(t_G), e_G)
        inverse_total = np.float32(1.0) / total
        factor = library_B[b] * inverse_total
        if zinb:
            for k in range(len(places)):
                there_G[places[k]] = np.float32(1.0)
            value, slope = _zinb_zeros(factor, e_G, theta_G, inverse_G, there_G, dropout_BG[b], t_G)
            for k in range(len(places)):
                there_G[places[k]] = np.float32(0.0)
        else:
            value, slope = _nb_zeros(factor, e_G, theta_G, inverse_G, t_G)
        more, change = _counts(places, x_N, factor, e_G, theta_G, t_G, work)
        value_B[b] = np.float32(np.float64(value) + np.float64(more) + constant_B[b])
        _through_softmax(e_G, inverse_total, slope + change, t_G)
