"""The negative binomial likelihood of a decoder that is frozen, compiled: what surgery needs of it, and no more.

As `likelihood_kernel`, with three things left out that do not change while a reference is frozen. Theta has no
gradient. What is of the counts and theta alone, lnGamma(x + theta) - lnGamma(theta) - ln x!, is a number of each cell
that is known before; so a count that is not zero costs a logarithm, where it costs two gamma functions and their
derivatives otherwise. And counts stay sparse: nobody looks at the zeros to find out that they are zero.

Gradients are written over the logits. The functions are those of `likelihood_kernel`. Shapes: B cells, G genes.
"""

# compiled with: 2836f4c0658b

import numpy as np
from numba import njit

from scarcade.engine.vector_math import SUMS, apart, bits32, finite, float32, log32, ordered, rows_apart, wide
from scarcade.models.likelihood_kernel import (
    EPS,
    STRIP,
    clear,
    exponentials,
    finish,
    inverses,
    mark,
    nb_as_zero,
    zinb_as_zero,
)


@njit(forceinline=True, error_model="numpy")
def _looked_through(logits_G: np.ndarray) -> tuple[bool, np.float32]:
    """Whether all are finite, and the highest."""
    wide()
    largest, highest = np.int32(0), np.int32(-0x7FFFFFFF)
    for g in range(len(logits_G)):
        bits = bits32(logits_G[g])
        largest = max(largest, bits & np.int32(0x7FFFFFFF))
        highest = max(highest, ordered(bits))
    return bool(largest < np.int32(0x7F800000)), float32(ordered(highest))


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _counts(places, x_N, factor, e_G, theta_G, t_G, work):  # type: ignore[no-untyped-def]
    """What counts that are not zero add: sets their gradients; returns the sum of log p.

    They are gathered first, so that the arithmetic is vector code.
    """
    wide()
    n = len(places)
    for k in range(n):
        g = places[k]
        work[0, k] = np.float32(x_N[k])
        work[1, k] = factor * e_G[g]
        work[2, k] = theta_G[g]
        work[3, k] = t_G[g]
    value = np.float32(0.0)
    for k in range(n):
        x, rate, theta = work[0, k], work[1, k], work[2, k]
        one_by_sum = np.float32(1.0) / (theta + EPS + rate)
        rate_eps = rate + EPS
        value += x * log32(rate_eps * one_by_sum)
        t = x * (rate / rate_eps) - rate * (x + theta) * one_by_sum
        work[3, k] = work[3, k] if x < EPS else t  # a zero that was kept
    for k in range(n):
        t_G[places[k]] = work[3, k]
    return value


@njit(nogil=True, cache=True, error_model="numpy")
def rows(  # type: ignore[no-untyped-def]
    start, stop, indptr, genes, counts, logits_BG, dropout_BG, library_B, constant_B, theta_G, value_B
) -> None:
    """Rows [start, stop): log p of each cell, and its gradients by the logits (and dropout logits) in their place.

    `dropout_BG` is (0, 0) for the plain negative binomial. `constant_B` is what the counts and theta alone give.
    """
    n_genes = logits_BG.shape[1]
    zinb = dropout_BG.shape[0] > 0
    e_G, there_G = apart(n_genes), np.zeros(n_genes, np.float32)
    inverse_G, d_theta_G = np.empty(n_genes, np.float32), np.empty(n_genes, np.float32)  # the latter is not asked for
    longest = 0
    for b in range(start, stop):
        longest = max(longest, indptr[b + 1] - indptr[b])
    work_S, work_4N = apart(5 * STRIP), rows_apart(4, longest)
    theta_is_finite, _ = inverses(theta_G, inverse_G)
    for b in range(start, stop):
        t_G = logits_BG[b]
        sound, highest = _looked_through(t_G)
        sound = sound and theta_is_finite and library_B[b] < np.float32(1e38)
        if not (sound and (not zinb or finite(dropout_BG[b]))):  # the code below assumes finite numbers
            value_B[b] = np.nan
            t_G[:] = np.nan
            if zinb:
                dropout_BG[b] = np.nan
            continue
        places, x_N = genes[indptr[b] : indptr[b + 1]], counts[indptr[b] : indptr[b + 1]]
        inverse_total = np.float32(1.0) / exponentials(t_G, highest, e_G)
        factor = library_B[b] * inverse_total
        if zinb:
            pi_G = dropout_BG[b]
            mark(places, x_N, there_G)
            value = zinb_as_zero(there_G, factor, e_G, theta_G, inverse_G, pi_G, t_G, d_theta_G, pi_G, work_S)
            clear(places, there_G)
        else:
            value = nb_as_zero(factor, e_G, theta_G, inverse_G, t_G, d_theta_G, work_S)
        value += _counts(places, x_N, factor, e_G, theta_G, t_G, work_4N)
        value_B[b] = np.float32(value + constant_B[b])
        finish(inverse_total, e_G, t_G)
