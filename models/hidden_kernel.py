"""What comes after the product of a hidden layer, forward and back, compiled: rows of conditions, norm, ReLU, dropout.

Torch does these in a dozen operations forward and as many back, each of which costs more than its arithmetic where
cells are few. Here each cell's units are walked over a few times, in vectors. Sums and squares are float64, as torch's
over cells: what is large must not look like what does not vary. Loops are short and go over few arrays for the reason
that `likelihood_kernel.nb_as_zero` gives; what is of the units (statistics, factors) lies in one array for the same
reason.

Shapes: B cells, H units, K rows of a table.
"""

# compiled with: 1b8e897c26b8

import numpy as np
from numba import njit

from scarcade.engine.vector_math import EXACT, wide

STRIP = 256  # units that are done together
NONE, RUNNING, BATCH = range(3)  # modes: no batch norm, with the statistics that it remembers, with those of the cells
SUMS = {"contract", "reassoc", "nsz", "arcp"}  # not "nnan": what is not a number must come through


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _add_row(row_S, z_S) -> None:  # type: ignore[no-untyped-def]
    wide()
    for s in range(len(z_S)):
        z_S[s] += row_S[s]


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _add_sums(z_S, sums_S) -> None:  # type: ignore[no-untyped-def]
    wide()
    for s in range(len(z_S)):
        sums_S[s] += np.float64(z_S[s])


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _add_squares(z_S, mean_S, sums_S) -> None:  # type: ignore[no-untyped-def]
    wide()
    for s in range(len(z_S)):
        d = np.float64(z_S[s]) - np.float64(mean_S[s])
        sums_S[s] += d * d


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _activate(z_S, factor_2S, slope, y_S) -> None:  # type: ignore[no-untyped-def]
    wide()
    n = len(z_S)
    for s in range(n):
        v = z_S[s] * factor_2S[s] + factor_2S[STRIP + s]
        y_S[s] = v if v > np.float32(0.0) else v * slope


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _drop(u_S, p, y_S) -> None:  # type: ignore[no-untyped-def]
    wide()
    scale = np.float32(1.0) / (np.float32(1.0) - p)
    for s in range(len(y_S)):
        y_S[s] *= scale if u_S[s] >= p else np.float32(0.0)


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _back_activate(z_S, factor_2S, slope, d_S) -> None:  # type: ignore[no-untyped-def]
    wide()
    for s in range(len(z_S)):
        v = z_S[s] * factor_2S[s] + factor_2S[STRIP + s]
        d_S[s] *= np.float32(1.0) if v > np.float32(0.0) else slope


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _add_products(d_S, z_S, mean_S, sums_2S) -> None:  # type: ignore[no-untyped-def]
    wide()
    for s in range(len(d_S)):
        d = np.float64(d_S[s])
        sums_2S[s] += d
        sums_2S[STRIP + s] += d * (np.float64(z_S[s]) - np.float64(mean_S[s]))


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _back_normalise(z_S, of_units_4S, d_S) -> None:  # type: ignore[no-untyped-def]
    wide()
    for s in range(len(d_S)):
        centred = z_S[s] - of_units_4S[3 * STRIP + s]
        d_S[s] = of_units_4S[s] * (d_S[s] - of_units_4S[STRIP + s] - centred * of_units_4S[2 * STRIP + s])


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _scale(factor_S, d_S) -> None:  # type: ignore[no-untyped-def]
    wide()
    for s in range(len(d_S)):
        d_S[s] *= factor_S[s]


@njit(forceinline=True, error_model="numpy")
def _add_all(bias_H, table_KH, code_B, z_BH, first, end) -> None:  # type: ignore[no-untyped-def]
    """``z += bias + table[code]`` of the units [first, end); without a bias or a table those have no numbers."""
    for b in range(len(z_BH)):
        if len(bias_H) > 0:
            _add_row(bias_H[first:end], z_BH[b, first:end])
        if len(table_KH) > 0:
            _add_row(table_KH[code_B[b], first:end], z_BH[b, first:end])


@njit(forceinline=True, error_model="numpy")
def _add_up(d_BH, code_B, d_bias_H, d_table_KH, first, end) -> None:  # type: ignore[no-untyped-def]
    """The way back through `_add_all`, for whoever wants it."""
    for b in range(len(d_BH)):
        if len(d_bias_H) > 0:
            _add_row(d_BH[b, first:end], d_bias_H[first:end])
        if len(d_table_KH) > 0:
            _add_row(d_BH[b, first:end], d_table_KH[code_B[b], first:end])


@njit(forceinline=True, error_model="numpy")
def _statistics(z_BH, first, end, sums_S, mean_S, variance_S) -> None:  # type: ignore[no-untyped-def]
    """Mean and (biased) variance over cells of the units [first, end)."""
    n_cells, of_strip = len(z_BH), sums_S[: end - first]
    of_strip[:] = 0.0
    for b in range(n_cells):
        _add_sums(z_BH[b, first:end], of_strip)
    for s in range(end - first):
        mean_S[s] = np.float32(of_strip[s] / n_cells)
    of_strip[:] = 0.0
    for b in range(n_cells):
        _add_squares(z_BH[b, first:end], mean_S, of_strip)
    for s in range(end - first):
        variance_S[s] = of_strip[s] / n_cells


@njit(nogil=True, cache=True, error_model="numpy")
def forward(  # type: ignore[no-untyped-def]
    start, stop, bias_H, table_KH, code_B, weight_H, shift_H, running_2H, momentum, eps, mode, slope, u_BH, p, z_BH,
    kept_3H, y_BH,
) -> None:  # fmt: skip
    """Units [start, stop) of a layer whose norm, if any, is over cells.

    Adds bias and rows to the product `z_BH`, which is kept for the way back with `kept_3H`: each unit's mean, the
    inverse of its standard deviation, and batch norm's weight times that.

    Args:
        weight_H, shift_H: batch norm's weight and bias, and what it remembers: `running_2H`, a pair of arrays.
        mode: which statistics it takes.
        slope: what is negative is multiplied by.
        u_BH: numbers below `p` drop a unit of a cell; without dropout (B, 0).
    """
    n_cells, drops, one = len(z_BH), u_BH.shape[1] > 0, np.float32(1.0)
    sums_S, factor_2S = np.empty(STRIP, np.float64), np.empty(2 * STRIP, np.float32)
    variance_S = np.empty(STRIP, np.float64)
    for first in range(start, stop, STRIP):
        end = min(first + STRIP, stop)
        _add_all(bias_H, table_KH, code_B, z_BH, first, end)
        mean_S, inverse_S, kept_S = kept_3H[0, first:end], kept_3H[1, first:end], kept_3H[2, first:end]
        if mode == BATCH:
            _statistics(z_BH, first, end, sums_S, mean_S, variance_S)
        for s in range(end - first):
            h = first + s
            if mode == NONE:
                mean_S[s], inverse_S[s], kept_S[s], factor_2S[STRIP + s] = 0.0, 1.0, 1.0, 0.0
            else:
                if mode == RUNNING:
                    mean_S[s], variance = running_2H[0][h], np.float64(running_2H[1][h])
                else:
                    variance = variance_S[s]
                    unbiased = np.float32(variance * n_cells / (n_cells - 1))
                    running_2H[0][h] = (one - momentum) * running_2H[0][h] + momentum * mean_S[s]
                    running_2H[1][h] = (one - momentum) * running_2H[1][h] + momentum * unbiased
                inverse_S[s] = np.float32(1.0 / np.sqrt(variance + eps))
                kept_S[s] = weight_H[h] * inverse_S[s]
                factor_2S[STRIP + s] = shift_H[h] - mean_S[s] * kept_S[s]
            factor_2S[s] = kept_S[s]
        for b in range(n_cells):
            _activate(z_BH[b, first:end], factor_2S, slope, y_BH[b, first:end])
            if drops:
                _drop(u_BH[b, first:end], p, y_BH[b, first:end])


@njit(nogil=True, cache=True, error_model="numpy")
def backward(  # type: ignore[no-untyped-def]
    start, stop, shift_H, kept_3H, mode, slope, u_BH, p, z_BH, code_B, d_BH, d_norm_2H, d_bias_H, d_table_KH
) -> None:
    """The way back through `forward`: `d_BH` comes as the gradient of y and leaves as that of z.

    `d_norm_2H` gets those of batch norm's weight and bias, `d_bias_H` and `d_table_KH` those of the bias and the rows,
    if they are wanted.
    """
    n_cells, drops = len(z_BH), u_BH.shape[1] > 0
    factor_2S, of_units_4S = np.empty(2 * STRIP, np.float32), np.empty(4 * STRIP, np.float32)
    sums_2S = np.empty(2 * STRIP, np.float64)
    for first in range(start, stop, STRIP):
        end = min(first + STRIP, stop)
        mean_S = kept_3H[0, first:end]
        for s in range(end - first):
            factor_2S[s] = kept_3H[2, first + s]
            factor_2S[STRIP + s] = np.float32(0.0)
            if mode != NONE:
                factor_2S[STRIP + s] = shift_H[first + s] - mean_S[s] * factor_2S[s]
        sums_2S[:] = 0.0
        for b in range(n_cells):
            z_S, d_S = z_BH[b, first:end], d_BH[b, first:end]
            if drops:
                _drop(u_BH[b, first:end], p, d_S)
            _back_activate(z_S, factor_2S, slope, d_S)
            if mode != NONE:
                _add_products(d_S, z_S, mean_S, sums_2S)
        if mode != NONE:
            for s in range(end - first):
                inverse = np.float64(kept_3H[1, first + s])
                d_norm_2H[0, first + s] = np.float32(sums_2S[STRIP + s] * inverse)
                d_norm_2H[1, first + s] = np.float32(sums_2S[s])
                of_units_4S[s] = kept_3H[2, first + s]
                of_units_4S[STRIP + s] = np.float32(sums_2S[s] / n_cells)
                of_units_4S[2 * STRIP + s] = np.float32(sums_2S[STRIP + s] * inverse * inverse / n_cells)
                of_units_4S[3 * STRIP + s] = mean_S[s]
        for b in range(n_cells):
            if mode == BATCH:
                _back_normalise(z_BH[b, first:end], of_units_4S, d_BH[b, first:end])
            elif mode == RUNNING:
                _scale(of_units_4S, d_BH[b, first:end])
        _add_up(d_BH, code_B, d_bias_H, d_table_KH, first, end)


@njit(nogil=True, cache=True, error_model="numpy")
def add_up(d_BH, code_B, d_bias_H, d_table_KH) -> None:  # type: ignore[no-untyped-def]
    """The gradients of bias and rows from those of all cells."""
    _add_up(d_BH, code_B, d_bias_H, d_table_KH, 0, d_BH.shape[1])


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _of_cell(z_H) -> tuple[np.float32, np.float64]:  # type: ignore[no-untyped-def]
    """Mean and variance of a cell's units."""
    wide()
    total, squares = 0.0, 0.0
    for h in range(len(z_H)):
        total += np.float64(z_H[h])
    mean = np.float32(total / len(z_H))
    for h in range(len(z_H)):
        d = np.float64(z_H[h]) - np.float64(mean)
        squares += d * d
    return mean, np.float64(squares / len(z_H))


@njit(forceinline=True, error_model="numpy", fastmath=EXACT)
def _normalise(z_H, mean, inverse, slope, y_H) -> None:  # type: ignore[no-untyped-def]
    wide()
    for h in range(len(z_H)):
        v = (z_H[h] - mean) * inverse
        y_H[h] = v if v > np.float32(0.0) else v * slope


@njit(nogil=True, cache=True, error_model="numpy")
def forward_of_cells(  # type: ignore[no-untyped-def]
    start, stop, bias_H, table_KH, code_B, eps, slope, u_BH, p, z_BH, statistics_2B, y_BH
) -> None:
    """Cells [start, stop) of a layer with layer norm, which has no weights; keeps each one's mean and inverse."""
    for b in range(start, stop):
        if len(bias_H) > 0:
            _add_row(bias_H, z_BH[b])
        if len(table_KH) > 0:
            _add_row(table_KH[code_B[b]], z_BH[b])
        mean, variance = _of_cell(z_BH[b])
        inverse = np.float32(1.0 / np.sqrt(variance + eps))
        statistics_2B[0, b], statistics_2B[1, b] = mean, inverse
        _normalise(z_BH[b], mean, inverse, slope, y_BH[b])
        if u_BH.shape[1] > 0:
            _drop(u_BH[b], p, y_BH[b])


@njit(forceinline=True, error_model="numpy", fastmath=SUMS)
def _back_cell(z_H, mean, inverse, slope, d_H) -> None:  # type: ignore[no-untyped-def]
    wide()
    total, by_z = 0.0, 0.0
    for h in range(len(z_H)):
        v = (z_H[h] - mean) * inverse
        d = d_H[h] * (np.float32(1.0) if v > np.float32(0.0) else slope)
        total += np.float64(d)  # a loop that sums writes nothing: see `vector_math.apart`
        by_z += np.float64(d * v)
    of_all, of_z = np.float32(total / len(z_H)), np.float32(by_z / len(z_H))
    for h in range(len(z_H)):
        v = (z_H[h] - mean) * inverse
        d = d_H[h] * (np.float32(1.0) if v > np.float32(0.0) else slope)
        d_H[h] = inverse * (d - of_all - v * of_z)


@njit(nogil=True, cache=True, error_model="numpy")
def backward_of_cells(start, stop, slope, u_BH, p, z_BH, statistics_2B, d_BH) -> None:  # type: ignore[no-untyped-def]
    """The way back through `forward_of_cells`, in place."""
    for b in range(start, stop):
        if u_BH.shape[1] > 0:
            _drop(u_BH[b], p, d_BH[b])
        _back_cell(z_BH[b], statistics_2B[0, b], statistics_2B[1, b], slope, d_BH[b])
