"""The 19 Gaussians of the MMD and their slopes for all pairs of cells, compiled: each pair once, in vector code.

Eager torch goes over (cells x cells) sixty times, and its exp takes several times as long where the narrow Gaussians
underflow, which is nearly everywhere. `exp32` is that of `engine.vector_math`.
"""

# compiled with: 1b8e897c26b8

import numpy as np
from numba import njit

from scarcade.engine.vector_math import SUMS, exp32


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _row(own_D, z_DN, weight_N, factor_W, distance_N, kernel_N, slope_N) -> np.float64:  # type: ignore[no-untyped-def]
    """The pairs of a cell with N others: writes weight * slope, returns the sum of weight * kernel."""
    n = len(distance_N)
    distance_N[:] = np.float32(0.0)
    kernel_N[:] = np.float32(0.0)
    slope_N[:] = np.float32(0.0)
    for d in range(len(own_D)):
        for j in range(n):
            # differences and not |a|^2 + |b|^2 - 2ab: the narrowest Gaussian sees distances of 1e-3
            difference = z_DN[d, j] - own_D[d]
            distance_N[j] += difference * difference
    for w in range(len(factor_W)):
        factor = factor_W[w]
        for j in range(n):
            part = exp32(factor * distance_N[j])
            kernel_N[j] += part
            slope_N[j] += factor * part
    total = 0.0
    for j in range(n):  # a loop that sums writes nothing: see `apart`
        total += np.float64(weight_N[j] * kernel_N[j])
    for j in range(n):
        slope_N[j] *= weight_N[j]
    return total  # type: ignore[return-value]


@njit(nogil=True, cache=True, error_model="numpy")
def pairs(start, stop, z_DB, weight_CC, place_B, factor_W, total_B, slope_BB) -> None:  # type: ignore[no-untyped-def]
    """Rows `start` to `stop` of the upper triangle and as many from its end: all of them are equally much work.

    Writes the sum over the pairs of each row, weighted, without a cell's pair with itself; and the weighted slopes.
    """
    n = len(place_B)
    distance_B, kernel_B, weight_B = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    own_D = np.empty(len(z_DB), np.float32)
    for k in range(2 * start, 2 * stop):
        i = k // 2 if k % 2 == 0 else n - 1 - k // 2
        if k % 2 == 1 and i == k // 2:
            break  # the row in the middle
        own_D[:] = z_DB[:, i]
        of_own = weight_CC[place_B[i]]
        for j in range(n):
            weight_B[j] = of_own[place_B[j]]
        rest = i + 1
        total_B[i] = _row(
            own_D, z_DB[:, rest:], weight_B[rest:], factor_W, distance_B[rest:], kernel_B[rest:], slope_BB[i, rest:]
        )
