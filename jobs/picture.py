"""What the report's picture of a query is drawn from: a sample of its cells as small integers, in base64.

A cell is ten bytes or so: its place in the frame in twice 16 bits, and one byte each for a predicted label (two where
the reference has many), for its uncertainty and for its distance. So a hundred queries fit into a page that still opens
at once. The frame reaches half the reference's width beyond the reference on every side; what lies farther out is put
on its edge and counted.
"""

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from scarcade.jobs.label_transfer import Prediction
from scarcade.jobs.projection import Projection

SHOWN = 1_500  # cells of a query that its picture shows
MARGIN = 0.5  # of the reference's width, on every side of it
COLUMNS = 4  # label columns that a picture can be coloured by
FARTHEST = 3.0  # the largest distance that is told apart
STEPS = 65_535


def picture(
    mean: np.ndarray,
    predictions: Sequence[Prediction],
    distance: np.ndarray | None,
    projection: Projection | None,
    seed: int,
) -> dict[str, Any]:
    """``{"picture": ...}`` of a query's cells with the latent means (n, L); {} where there is nothing to draw."""
    if projection is None or not len(mean):
        return {}
    rows = shown_rows(len(mean), seed)
    return {
        "picture": {
            **placed(mean[rows], projection),
            "labels": {one.column.name: label_codes(one.codes[rows], len(one.column)) for one in predictions[:COLUMNS]},
            "uncertainty": {one.column.name: bytes_of(one.uncertainty[rows], 1.0) for one in predictions[:COLUMNS]},
            "distance": None if distance is None else bytes_of(distance[rows], FARTHEST),
        }
    }


def shown_rows(n: int, seed: int) -> np.ndarray:
    """The rows of the cells that are shown, in order (at most `SHOWN`,)."""
    if n <= SHOWN:
        return np.arange(n)
    return np.sort(np.random.default_rng([seed, 3]).choice(n, SHOWN, replace=False))


def placed(mean: np.ndarray, projection: Projection) -> dict[str, Any]:
    """Where the cells (m, L) lie in the frame of the projection."""
    points = projection.of(mean)
    whole = in_frame(points, projection)
    outside = (whole == 0) | (whole == STEPS)
    return {
        "frame": projection.frame,
        "n": len(points),
        "outside": int(outside.any(axis=1).sum()),
        "points": words_of(whole),
    }


def in_frame(points: np.ndarray, projection: Projection) -> np.ndarray:
    """Whole numbers 0 .. `STEPS` for points (m, 2): the reference's cells lie in the middle half of both axes."""
    low, high = projection.points.min(axis=0), projection.points.max(axis=0)
    width = np.where(high > low, high - low, 1.0)
    share = (points - low + MARGIN * width) / ((1 + 2 * MARGIN) * width)
    return np.asarray(np.rint(np.clip(share, 0, 1) * STEPS), np.uint16)


def words_of(whole: np.ndarray) -> str:
    """Whole numbers 0 .. `STEPS` as pairs of bytes, the lower first."""
    return base64.b64encode(whole.astype("<u2").tobytes()).decode()


def label_codes(codes: np.ndarray, n_labels: int) -> str:
    """Codes as bytes, or as pairs of bytes where there are more than 255 labels; the largest means none."""
    kind = np.dtype("u1" if n_labels <= 255 else "<u2")
    none = np.iinfo(kind).max
    return base64.b64encode(np.where(codes < 0, none, codes).astype(kind).tobytes()).decode()


def bytes_of(values: np.ndarray, top: float) -> str:
    """Values 0 .. `top` as bytes 0 .. 255; what is beyond is as `top`."""
    whole = np.rint(np.clip(values / top, 0, 1) * 255)
    return base64.b64encode(whole.astype(np.uint8).tobytes()).decode()


@contextmanager
def _opened(result: Path) -> Iterator[Any]:
    """An .h5ad or a .zarr."""
    if result.suffix == ".zarr":
        import zarr

        yield zarr.open_group(result, mode="r", use_consolidated=False)
    else:
        with h5py.File(result) as file:
            yield file


def placed_again(
    drawn: dict[str, Any], result: Path, obsm_key: str, n_latent: int, n_cells: int, projection: Projection, seed: int
) -> dict[str, Any] | None:
    """A picture that was made for another frame, from the latent in the query's `result`; None if that is gone.

    A query that was done already keeps its record, and --report.picture may have changed since.
    """
    rows = shown_rows(n_cells, seed)
    try:
        with _opened(result) as file:
            mean = np.asarray(file[f"obsm/{obsm_key}"][:, :n_latent], np.float32)[rows]
    except (OSError, KeyError):
        return None
    return {**drawn, **placed(mean, projection)}
