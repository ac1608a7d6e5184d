"""The normal distributions of a variational autoencoder, compiled: what two heads give, a draw, and its KL divergence.

Torch does these in a dozen operations forward and two dozen back, each of which costs more than its arithmetic where
the latent has ten dimensions. Loops go over one cell's dimensions; what is summed over them is summed in their order,
so that the last bits depend on nothing else.

Shapes: B cells (N rows), L latent dimensions; the heads' products lie side by side, mean first, in (B, 2 L).
"""

# compiled with: 1b8e897c26b8

import numpy as np
from numba import njit

from scarcade.engine.vector_math import EXACT, HALF_LOG_2PI, apart, exp32, log32, wide


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _moments(product_L, bias_L, least, own_L, variance_L) -> None:  # type: ignore[no-untyped-def]
    """exp(product + bias), and that with `least`; the first is what the way back needs."""
    wide()
    for i in range(len(own_L)):
        p = product_L[i] + bias_L[i]
        # what is not finite must come through, and what is too large must not be capped
        own_L[i] = exp32(p) + (p - p) if p < np.float32(88.0) else np.float32(np.inf) + (p - p)
        variance_L[i] = own_L[i] + least


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _draw(product_L, bias_L, variance_L, noise_L, mean_L, z_L) -> None:  # type: ignore[no-untyped-def]
    wide()
    for i in range(len(z_L)):
        mean_L[i] = product_L[i] + bias_L[i]
        z_L[i] = mean_L[i] + np.sqrt(variance_L[i]) * noise_L[i]


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _divergence(product_L, bias_L, least, mean_L, variance_L, term_L) -> None:  # type: ignore[no-untyped-def]
    wide()
    for i in range(len(term_L)):
        v = variance_L[i]
        log_v = log32(max(v, np.float32(1.2e-38))) if least > np.float32(0.0) else product_L[i] + bias_L[i]
        term_L[i] = v + mean_L[i] * mean_L[i] - np.float32(1.0) - log_v


@njit(nogil=True, cache=True, error_model="numpy")
def drawn(product_B2L, biases, noise_BL, least, own_BL, mean_BL, variance_BL, z_BL, kl_B) -> None:  # type: ignore[no-untyped-def]
    """Mean, variance (``exp(.) + least``), ``z = mean + sd * noise`` and KL(. || N(0, I)) of each cell."""
    n_latent = z_BL.shape[1]
    term_L = apart(n_latent)
    for b in range(len(z_BL)):
        _moments(product_B2L[b, n_latent:], biases[1], least, own_BL[b], variance_BL[b])
        _draw(product_B2L[b, :n_latent], biases[0], variance_BL[b], noise_BL[b], mean_BL[b], z_BL[b])
        _divergence(product_B2L[b, n_latent:], biases[1], least, mean_BL[b], variance_BL[b], term_L)
        total = np.float32(0.0)
        for i in range(n_latent):
            total += term_L[i]
        kl_B[b] = np.float32(0.5) * total


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _back(d_z_L, d_kl, mean_L, own_L, variance_L, noise_L, d_mean_L, d_own_L) -> None:  # type: ignore[no-untyped-def]
    """By the heads' products; `own / variance` is 1 where nothing was added to the variance."""
    wide()
    for i in range(len(d_z_L)):
        v = max(variance_L[i], np.float32(1.2e-38))
        d_mean_L[i] = d_z_L[i] + d_kl * mean_L[i]
        spread = d_z_L[i] * noise_L[i] / np.sqrt(v) + d_kl * (np.float32(1.0) - np.float32(1.0) / v)
        d_own_L[i] = np.float32(0.5) * own_L[i] * spread


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _add(d_L, to_L) -> None:  # type: ignore[no-untyped-def]
    wide()
    for i in range(len(d_L)):
        to_L[i] += d_L[i]


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _add_times(d_L, own_L, to_L) -> None:  # type: ignore[no-untyped-def]
    wide()
    for i in range(len(d_L)):
        to_L[i] += d_L[i] * own_L[i]


@njit(nogil=True, cache=True, error_model="numpy")
def drawn_back(d_mean_BL, d_variance_BL, d_z_BL, d_kl_B, mean_BL, variance_BL, own_BL, noise_BL, d_B2L) -> None:  # type: ignore[no-untyped-def]
    """The gradient of the heads' products. Those of mean and variance have no rows where nothing came back."""
    n_latent = mean_BL.shape[1]
    for b in range(len(mean_BL)):
        d_mean_L, d_own_L = d_B2L[b, :n_latent], d_B2L[b, n_latent:]
        _back(d_z_BL[b], d_kl_B[b], mean_BL[b], own_BL[b], variance_BL[b], noise_BL[b], d_mean_L, d_own_L)
        if len(d_mean_BL) > 0:
            _add(d_mean_BL[b], d_mean_L)
        if len(d_variance_BL) > 0:
            _add_times(d_variance_BL[b], own_BL[b], d_own_L)


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _density(x_L, mean_L, log_variance_L, biases, distance_L, square_L) -> None:  # type: ignore[no-untyped-def]
    """(x - mean) / variance and (x - mean)^2 / variance."""
    wide()
    for i in range(len(x_L)):
        d = x_L[i] - (mean_L[i] + biases[0][i])
        p = log_variance_L[i] + biases[1][i]
        distance_L[i] = d * (exp32(-p) if p > np.float32(-88.0) else np.float32(np.inf))
        square_L[i] = d * distance_L[i]


@njit(nogil=True, cache=True, error_model="numpy")
def density(x_NL, product_N2L, biases, kept_N2L, log_p_N) -> None:  # type: ignore[no-untyped-def]
    """log Normal(x; mean, exp(.)) of each row, and what `density_back` needs."""
    n_latent = x_NL.shape[1]
    for b in range(len(x_NL)):
        mean_L, log_variance_L = product_N2L[b, :n_latent], product_N2L[b, n_latent:]
        square_L = kept_N2L[b, n_latent:]
        _density(x_NL[b], mean_L, log_variance_L, biases, kept_N2L[b, :n_latent], square_L)
        total = np.float32(0.0)
        for i in range(n_latent):
            total += square_L[i] + (log_variance_L[i] + biases[1][i])
        log_p_N[b] = np.float32(-0.5) * total - np.float32(HALF_LOG_2PI * n_latent)


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _density_back(d, distance_L, square_L, d_mean_L, d_log_variance_L) -> None:  # type: ignore[no-untyped-def]
    wide()
    for i in range(len(distance_L)):
        d_mean_L[i] = d * distance_L[i]
        d_log_variance_L[i] = np.float32(0.5) * d * (square_L[i] - np.float32(1.0))


@njit(nogil=True, cache=True, error_model="numpy")
def density_back(d_N, kept_N2L, d_N2L) -> None:  # type: ignore[no-untyped-def]
    """The gradient of the heads' products; that of x is minus the first half."""
    n_latent = kept_N2L.shape[1] // 2
    for b in range(len(d_N)):
        distance_L, square_L = kept_N2L[b, :n_latent], kept_N2L[b, n_latent:]
        _density_back(d_N[b], distance_L, square_L, d_N2L[b, :n_latent], d_N2L[b, n_latent:])
