"""The compiled search of `neighbours`: float32 distances by strips of cells, float64 for those that could be near.

A pair costs a subtraction and a multiplication for each dimension, eight pairs at once; only a cell whose float32
distance could be below that of the farthest neighbour so far is looked at again, exactly. That is some hundred of a
million, so the answer is exact at the price of the rough pass. It holds no interpreter lock: threads take queries.
"""

import numpy as np
from numba import njit

STRIP = 512  # cells whose distances to one query are formed at once: 2 kB, in the first cache
GROUP = 16  # queries that go through a strip while it is in the cache


def strips_of(latent: np.ndarray) -> np.ndarray:
    """`latent` float32 (N, L) as (strips, L, STRIP), filled up with infinity: dimension by dimension within a strip."""
    n, width = latent.shape
    whole, rest = divmod(n, STRIP)
    out = np.full((whole + bool(rest), width, STRIP), np.inf, np.float32)
    for start in range(0, whole, 64):  # by pieces: no second copy of the whole
        stop = min(start + 64, whole)
        out[start:stop] = latent[start * STRIP : stop * STRIP].reshape(-1, STRIP, width).transpose(0, 2, 1)
    if rest:
        out[whole, :, :rest] = latent[whole * STRIP :].T
    return out


@njit(nogil=True, cache=True)
def _farther(square: float, place: int, other_square: float, other_place: int) -> bool:
    return square > other_square or (square == other_square and place > other_place)


@njit(nogil=True, cache=True)
def _sink(squares: np.ndarray, places: np.ndarray, at: int, n: int) -> None:
    """Let the entry `at` of a heap of `n` (the farthest first) sink to where it belongs."""
    while True:
        child = 2 * at + 1
        if child >= n:
            return
        if child + 1 < n and _farther(squares[child + 1], places[child + 1], squares[child], places[child]):
            child += 1
        if not _farther(squares[child], places[child], squares[at], places[at]):
            return
        squares[at], squares[child] = squares[child], squares[at]
        places[at], places[child] = places[child], places[at]
        at = child


@njit(nogil=True, cache=True, fastmath={"contract"})
def _rough(strip: np.ndarray, query: np.ndarray, limit: np.float32, out: np.ndarray) -> int:
    """Squared float32 distances of a query to the cells of a strip; how many are not above `limit`."""
    width = len(query)
    out[:] = 0.0
    # places are counted unsigned: numba checks signed ones for negative values, which forbids vectors
    for at in range(0, width - 1, 2):  # two dimensions for each time that `out` is loaded and stored
        one, other = query[at], query[at + 1]
        ones, others = strip[at], strip[at + 1]
        for i in range(STRIP):
            j = np.uintp(i)
            a, b = one - ones[j], other - others[j]
            out[j] += a * a + b * b
    if width % 2:
        one, ones = query[width - 1], strip[width - 1]
        for i in range(STRIP):
            j = np.uintp(i)
            a = one - ones[j]
            out[j] += a * a
    n = np.int32(0)
    for i in range(STRIP):
        n += np.int32(out[np.uintp(i)] <= limit)
    return int(n)


@njit(nogil=True, cache=True)
def nearest(strips: np.ndarray, latent: np.ndarray, query: np.ndarray, squares: np.ndarray, places: np.ndarray) -> None:
    """Fill `squares` float64 (Q, k) and `places` int64 (Q, k) with the k nearest of `latent` (N, L), ascending.

    Of equal distances the smaller place comes first. Everything must be finite, and k at most N.
    """
    n_queries, k = squares.shape
    n, width = latent.shape
    # a float32 square of L differences is off by at most (L + 2) roundings of 2^-24; four times that is room enough
    slack = np.float32(1.0 + 4.0 * (width + 2) * 2.0**-24)
    rough = np.empty(STRIP, np.float32)
    squares[:] = np.inf
    places[:] = n
    for group in range(0, n_queries, GROUP):
        for number in range(len(strips)):
            for q in range(group, min(group + GROUP, n_queries)):
                own, at = squares[q], places[q]
                limit = np.float32(own[0]) * slack
                if not _rough(strips[number], query[q], limit, rough):
                    continue
                first = number * STRIP
                for j in range(min(STRIP, n - first)):
                    if not rough[j] <= limit:
                        continue
                    square = 0.0
                    for dimension in range(width):
                        difference = np.float64(query[q, dimension]) - np.float64(latent[first + j, dimension])
                        square += difference * difference
                    if _farther(own[0], at[0], square, first + j):
                        own[0], at[0] = square, first + j
                        _sink(own, at, 0, k)
                        limit = np.float32(own[0]) * slack
        for q in range(group, min(group + GROUP, n_queries)):
            for last in range(k - 1, 0, -1):  # the farthest goes to the end, again and again
                squares[q, 0], squares[q, last] = squares[q, last], squares[q, 0]
                places[q, 0], places[q, last] = places[q, last], places[q, 0]
                _sink(squares[q], places[q], 0, last)
