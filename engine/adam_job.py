"""An update by Adam as a job of a crew: whether all gradients are numbers, and if they are, the update.

Torch's own kernel is as fast, but a step asks for it twice, for the large and the small parameters, and for products
of gradients with themselves before it, and wakes threads each time.

Shapes: N numbers of all parameters, one behind the other. Everything is float32.
"""

# compiled with: 71180ec2d16d

import numpy as np
from numba import njit

from scarcade.engine.addresses import numbers_at, reals_at
from scarcade.engine.crew import meet
from scarcade.engine.vector_math import bits32, wide

# What the record says, and then of each parameter
(CREW, THREADS, N_PARAMETERS, N_ALL, FOUND, HYPER) = range(6)
(PARAMETER, GRADIENT, MEAN, SQUARE, COUNT, FACTORS) = range(6)
HEAD, EACH = 6, 6
# float32 at HYPER: epsilon, weight decay, 1 - beta 1, beta 2, 1 - beta 2; and of each parameter at FACTORS: less the
# size of the step, and the root of the correction of the second moment's bias
PART = 4096  # numbers at which the work is cut
_REAL = 4  # bytes
_TOO_LARGE = 0x5F000000  # the bits of 2**63: the square of a larger number is none in float32


@njit(forceinline=True, error_model="numpy")
def _all_numbers(g_N) -> bool:  # type: ignore[no-untyped-def]
    """Whether all are numbers, with squares that are."""
    wide()
    largest = np.int32(0)
    for i in range(len(g_N)):
        largest = max(largest, bits32(g_N[i]) & np.int32(0x7FFFFFFF))
    return bool(largest < np.int32(_TOO_LARGE))


@njit(forceinline=True, error_model="numpy", fastmath={"contract"})
def _move(p_N, g_N, mean_N, square_N, hyper, factors) -> None:  # type: ignore[no-untyped-def]
    """Kingma & Ba 2015, algorithm 1, with an L2 term in the gradient: as ``FusedAdamKernel.cpp`` of torch has it."""
    wide()
    eps, decay, to_mean, keep, to_square = hyper[0], hyper[1], hyper[2], hyper[3], hyper[4]
    step, root = factors[0], factors[1]
    for i in range(len(p_N)):
        g = p_N[i] * decay + g_N[i]
        mean = to_mean * (g - mean_N[i]) + mean_N[i]
        square = (to_square * g) * g + square_N[i] * keep
        p_N[i] += step * mean / (np.sqrt(square) / root + eps)
        mean_N[i], square_N[i] = mean, square


@njit(forceinline=True, error_model="numpy")
def _part(begun, n, first, end) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """What a thread has of a parameter of `n` numbers, of which the first is number `begun` of all."""
    return min(max(first - begun, 0), n), min(max(end - begun, 0), n)


def job(record_at, thread) -> None:  # type: ignore[no-untyped-def]
    """Writes at `FOUND` + thread 1 if a gradient is not a number, of each thread; then no parameter is moved."""
    head = numbers_at(record_at, HEAD)
    n_parameters, n_threads, n_all = head[N_PARAMETERS], head[THREADS], head[N_ALL]
    record = numbers_at(record_at + 8 * HEAD, n_parameters * EACH)
    found, n_parts = numbers_at(head[FOUND], n_threads), -(-n_all // PART)
    first, end = PART * (n_parts * thread // n_threads), PART * (n_parts * (thread + 1) // n_threads)
    sound, begun = True, 0
    for k in range(n_parameters):
        n = record[k * EACH + COUNT]
        start, stop = _part(begun, n, first, end)
        if stop > start:
            sound &= _all_numbers(reals_at(record[k * EACH + GRADIENT] + _REAL * start, stop - start))
        begun += n
    found[thread] = not sound
    meet(head[CREW], 0, thread)
    for other in range(n_threads):
        if found[other]:
            return
    begun, hyper = 0, reals_at(head[HYPER], 5)
    for k in range(n_parameters):
        n, factors = record[k * EACH + COUNT], reals_at(record[k * EACH + FACTORS], 2)
        start, stop = _part(begun, n, first, end)
        if stop > start:
            place, m = _REAL * start, stop - start
            _move(
                reals_at(record[k * EACH + PARAMETER] + place, m), reals_at(record[k * EACH + GRADIENT] + place, m),
                reals_at(record[k * EACH + MEAN] + place, m), reals_at(record[k * EACH + SQUARE] + place, m),
                hyper, factors,
            )  # fmt: skip
        begun += n
