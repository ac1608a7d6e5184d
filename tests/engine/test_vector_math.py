import numpy as np
import scipy.special
from numba import njit

from scarcade.engine.vector_math import exp32, gamma_logs, log32, log64, of_ratio


@njit
def over32(kind: int, x: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(x)):
        out[i] = exp32(x[i]) if kind == 0 else log32(x[i]) if kind == 1 else of_ratio(x[i])[0]


@njit
def over64(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(x)):
        out[0, i] = log64(x[i])
        out[1, i], out[2, i] = gamma_logs(x[i])


def ulps(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((np.abs(found - wanted) / np.spacing(np.abs(wanted).astype(np.float32))).max())


def test_float32_functions_are_within_two_units_in_the_last_place() -> None:
    cases = [
        (0, np.linspace(-87, 88, 200_001), np.exp),
        (1, np.geomspace(1e-30, 1e30, 200_001), np.log),
        (2, np.geomspace(1e-30, 1e30, 200_001), np.log1p),
    ]
    for kind, grid, function in cases:
        x = grid.astype(np.float32)
        found = np.empty_like(x)
        over32(kind, x, found)
        wanted = function(x.astype(np.float64))
        near_zero = np.abs(wanted) > 1e-3 if kind == 1 else np.ones(len(x), bool)  # log near 1: absolute error
        assert ulps(found[near_zero], wanted[near_zero]) < 2, (kind, ulps(found[near_zero], wanted[near_zero]))
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)


def test_float64_functions() -> None:
    x = np.concatenate([np.geomspace(1e-8, 1e8, 100_001), [1.0, 2.0, 0.5, 1e20]])
    found = np.empty((3, len(x)))
    over64(x, found)
    np.testing.assert_allclose(found[0], np.log(x), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(found[1], scipy.special.gammaln(x), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found[2], scipy.special.digamma(x), rtol=1e-9, atol=1e-9)
