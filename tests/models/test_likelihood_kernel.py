import numpy as np
import scipy.special
from numba import njit

from scarcade.models import likelihood_kernel as kernel


@njit
def factorials(x: np.ndarray, out: np.ndarray, table: np.ndarray) -> None:
    for i in range(len(x)):
        out[i] = kernel._log_factorial(x[i], table)


def test_log_factorials_of_counts_and_of_fractions() -> None:
    """A fraction came out wrong once: numba had inlined gamma_logs at the wrong argument."""
    x = np.concatenate([np.arange(3000.0), [0.5, 2.5, 1023.5, 1e6, 1e12]])
    found = np.empty_like(x)
    factorials(x, found, kernel.LOG_FACTORIAL)
    np.testing.assert_allclose(found, scipy.special.gammaln(x + 1), rtol=1e-10, atol=1e-10)
