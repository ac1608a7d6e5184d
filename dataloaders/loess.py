"""Local quadratic regression of one variable on another: the loess of Cleveland and Grosse, as netlib's dloess.

Fits are made at the vertices of a k-d tree alone, and joined by cubics through the vertices' values and slopes
(Cleveland & Grosse 1991, "Computational methods for local regression", section 3). Written out here because the
selection of highly variable genes needs the same curve as scanpy's, which takes it from a Fortran library.
"""

import numpy as np

_CELL = 0.2  # a cell of the tree is cut until it holds at most span * _CELL of the points
_MARGIN = 0.005  # of the range, by which the tree reaches beyond the points


def fitted(x: np.ndarray, y: np.ndarray, *, span: float) -> np.ndarray:
    """The smooth of `y` at each of `x` (n,), local polynomials of degree 2 over `span` of the points."""
    order = np.argsort(x, kind="stable")
    xs, ys = x[order].astype(np.float64), y[order].astype(np.float64)
    n = len(xs)
    near = max(4, min(n, int(n * span + 1e-5)))
    vertices = _vertices(xs, max(int(n * span * _CELL), 1))
    fits = np.array([_local(xs, ys, at, min(near, n), span) for at in vertices])
    values, slopes = fits[:, 0], fits[:, 1]
    left = np.clip(np.searchsorted(vertices, xs, side="left") - 1, 0, len(vertices) - 2)
    width = vertices[left + 1] - vertices[left]
    t = (xs - vertices[left]) / width
    smooth = (
        (1 - t) ** 2 * (1 + 2 * t) * values[left]
        + t**2 * (3 - 2 * t) * values[left + 1]
        + (t * (1 - t) ** 2 * slopes[left] - t**2 * (1 - t) * slopes[left + 1]) * width
    )
    out = np.empty(n)
    out[order] = smooth
    return out


def _vertices(xs: np.ndarray, most: int) -> np.ndarray:
    """Where the tree cuts the line, ends included: at medians, until a cell holds at most `most` points."""
    low, high = xs[0], xs[-1]
    beyond = _MARGIN * max(high - low, max(abs(low), abs(high)) * 1e-3 + 1e-30)
    low, high = low - beyond, high + beyond
    cuts = [low, high]
    cells = [(0, len(xs), low, high)]
    while cells:
        start, stop, left, right = cells.pop()
        if stop - start <= most:
            continue
        cut_at = (start + 1 + stop) // 2  # points up to here go left; the cut is the last of them
        while cut_at > 1 and xs[cut_at - 2] == xs[cut_at - 1]:
            cut_at -= 1
        cut = xs[cut_at - 1]
        if cut in (left, right):
            continue
        cuts.append(cut)
        cells += [(start, cut_at, left, cut), (cut_at, stop, cut, right)]
    return np.unique(cuts)


def _local(xs: np.ndarray, ys: np.ndarray, at: float, near: int, span: float) -> tuple[float, float]:
    """Value and slope at `at` of the quadratic through the `near` nearest points, weighted by the tricube."""
    distance = np.abs(xs - at)
    reach = np.partition(distance, near - 1)[near - 1] * max(1.0, np.sqrt(span))
    inside = distance < reach * 0.999
    ratio = distance[inside] / reach
    weight = np.sqrt(np.where(ratio > 0.001, (1 - ratio**3) ** 3, 1.0))
    z = xs[inside] - at
    scale = max(float(np.abs(z).max()), 1e-300) if len(z) else 1.0
    design = np.stack([np.ones_like(z), z / scale, (z / scale) ** 2], axis=1)
    solution = np.linalg.lstsq(design * weight[:, None], ys[inside] * weight, rcond=1e-10)[0]
    return float(solution[0]), float(solution[1] / scale)
