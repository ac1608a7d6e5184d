"""Random numbers that are a function of (key, draw, place): Philox4x32-10, compiled.

A step of training draws from as many streams as its batch has lanes. A generator with a state must be made and warmed
up for each of them in every step, and makes one number at a time; here a number is computed from where it stands, many
of them in one vector, and there is nothing to make. (NumPy's Philox makes one at a time, in a generator for each
lane.) Philox: Salmon et al. 2011 (SC11), whose published test vectors are in tests/engine/test_philox.py. It is what
torch draws from on a GPU.

Shapes: L lanes; a lane has a key of two 32-bit words (in uint64).
"""

import math
from collections.abc import Sequence

import numpy as np
from numba import njit

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # from the key of one round to that of the next
TO_24_BITS = np.uint64(8)
UNIT = np.float32(2.0**-24)
TWO_PI = np.float32(2 * math.pi)

Words = tuple[np.uint64, np.uint64, np.uint64, np.uint64]


@njit(forceinline=True)
def _round(c: Words, k0: np.uint64, k1: np.uint64, n: np.uint64) -> Words:
    """Round `n` of the ten."""
    p0, p1 = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]
    k0, k1 = (k0 + n * STEPS[0]) & LOW, (k1 + n * STEPS[1]) & LOW
    return (p1 >> HALF) ^ c[1] ^ k0, p1 & LOW, (p0 >> HALF) ^ c[3] ^ k1, p0 & LOW


@njit(forceinline=True)
def four(c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64) -> Words:
    """Four 32-bit words of a counter of four and a key of two, each in a uint64."""
    c = _round((c0, c1, c2, c3), k0, k1, np.uint64(0))
    c = _round(c, k0, k1, np.uint64(1))
    c = _round(c, k0, k1, np.uint64(2))
    c = _round(c, k0, k1, np.uint64(3))
    c = _round(c, k0, k1, np.uint64(4))
    c = _round(c, k0, k1, np.uint64(5))
    c = _round(c, k0, k1, np.uint64(6))
    c = _round(c, k0, k1, np.uint64(7))
    c = _round(c, k0, k1, np.uint64(8))
    return _round(c, k0, k1, np.uint64(9))


def keys_of(segments: Sequence[Sequence[int]]) -> np.ndarray:
    """A key (L, 2) for each sequence of whole numbers; their number counts, and of each number the lower 64 bits."""
    lengths = np.array([len(segment) for segment in segments], np.uint64)
    words = np.zeros((len(segments), int(lengths.max(initial=0))), np.uint64)
    for row, segment in zip(words, segments, strict=True):
        row[: len(segment)] = [word & 0xFFFFFFFFFFFFFFFF for word in segment]
    found: np.ndarray = _folded(words, lengths)
    return found


@njit(cache=True)
def _folded(words: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Each word is encrypted with what the words before it have made."""
    keys = np.zeros((len(words), 2), np.uint64)
    for i in range(len(words)):
        k0, k1 = lengths[i], LOW
        for n in range(lengths[i]):
            word = words[i, n]
            k0, k1, _, _ = four(word & LOW, word >> HALF, np.uint64(n), LOW, k0, k1)
        keys[i, 0], keys[i, 1] = k0, k1
    return keys


@njit(nogil=True, cache=True)
def uniform(keys: np.ndarray, bounds: np.ndarray, draw: int, out: np.ndarray) -> None:
    """Uniform numbers on [0, 1), multiples of 2**-24.

    Args:
        bounds: int64 (L + 1,): lane i fills ``out[bounds[i]:bounds[i + 1]]``.
        draw: which one of a key's this is; below 2**32.
        out: float32, flat.
    """
    zero = np.uint64(0)
    for i in range(len(keys)):
        of_lane = out[bounds[i] : bounds[i + 1]]
        quarter = (len(of_lane) + 3) // 4  # a counter's four numbers are that far apart: stores of whole vectors
        whole = max(len(of_lane) - 3 * quarter, 0)
        k0, k1 = keys[i, 0], keys[i, 1]
        for n in range(whole):
            a, b, c, d = four(np.uint64(n), np.uint64(draw), zero, zero, k0, k1)
            of_lane[n] = np.float32(a >> TO_24_BITS) * UNIT
            of_lane[quarter + n] = np.float32(b >> TO_24_BITS) * UNIT
            of_lane[2 * quarter + n] = np.float32(c >> TO_24_BITS) * UNIT
            of_lane[3 * quarter + n] = np.float32(d >> TO_24_BITS) * UNIT
        for n in range(whole, quarter):
            words = four(np.uint64(n), np.uint64(draw), zero, zero, k0, k1)
            for w in range(4):
                if w * quarter + n < len(of_lane):
                    of_lane[w * quarter + n] = np.float32(words[w] >> TO_24_BITS) * UNIT


@njit(nogil=True, cache=True)
def normal(keys: np.ndarray, bounds: np.ndarray, draw: int, out: np.ndarray) -> None:
    """Standard normal numbers (Box and Muller 1958) up to 5.8; arguments as for `uniform`."""
    zero, one = np.uint64(0), np.uint64(1)
    for i in range(len(keys)):
        of_lane = out[bounds[i] : bounds[i + 1]]
        for n in range((len(of_lane) + 3) // 4):
            words = four(np.uint64(n), np.uint64(draw), zero, one, keys[i, 0], keys[i, 1])
            for pair in range(2):
                # in (0, 1], which has a logarithm
                first = np.float32((words[2 * pair] >> TO_24_BITS) + one) * UNIT
                angle = np.float32(words[2 * pair + 1] >> TO_24_BITS) * UNIT * TWO_PI
                radius = np.float32(math.sqrt(np.float32(-2.0) * np.float32(math.log(first))))
                place = 4 * n + 2 * pair
                if place < len(of_lane):
                    of_lane[place] = radius * np.float32(math.cos(angle))
                if place + 1 < len(of_lane):
                    of_lane[place + 1] = radius * np.float32(math.sin(angle))
