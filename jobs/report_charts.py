"""Curves and histograms of the report as the paths of SVG: text of a few hundred bytes, drawn by the browser.

Presentation attributes and not styles, because the page's content security policy allows no style of an element's own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 240, 84  # of a chart, in the units of its viewBox
SHAPES = (  # of marks, about the middle, one unit wide to each side: circle, triangle, square, diamond, cross
    "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "M0-1.25L1.15 .85H-1.15z",
    "M-.9-.9H.9V.9H-.9z",
    "M0-1.35L1.15 0L0 1.35L-1.15 0z",
    "M-.45-1.2H.45V-.45H1.2V.45H.45V1.2H-.45V.45H-1.2V-.45H-.45z",
)
POINTS = 80  # of a curve, at most: more are not seen


def histogram(counts: Sequence[int], first: int = 0, last: int | None = None) -> str:
    """The bars `first` .. `last` of a histogram as one path; the tallest of all bars fills the height."""
    top = max(counts, default=0)
    if not top:
        return ""
    step = WIDTH / len(counts)
    parts = []
    for i, count in list(enumerate(counts))[first:last]:
        if count:
            height = max(1.0, HEIGHT * count / top)
            parts.append(f"M{i * step + 0.5:.1f} {HEIGHT}v{-height:.1f}h{step - 1:.1f}v{height:.1f}z")
    return "".join(parts)


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The training curve: paths of what was trained on and of what was held out, and the ends of both axes.

    None where nothing was trained. Values that are not finite are left out.
    """
    found = {}
    for kind in ("train", "validation"):
        points = [(line["epoch"] + 1, line.get(f"{kind}/elbo")) for line in history]
        found[kind] = [(x, float(y)) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]
    every = [point for points in found.values() for point in points]
    if not every:
        return None
    low, high = min(y for _, y in every), max(y for _, y in every)
    last = max(x for x, _ in every)

    def path(points: Sequence[tuple[int, float]]) -> str:
        if len(points) > POINTS:
            points = [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]
        places = [
            f"{WIDTH * (x - 1) / max(1, last - 1):.1f} {HEIGHT * (high - y) / ((high - low) or 1.0):.1f}"
            for x, y in points
        ]
        return f"M{'L'.join(places)}" if len(places) > 1 else ""

    return {**{kind: path(points) for kind, points in found.items()}, "low": low, "high": high, "epochs": last}


def bars(
    composition: Mapping[str, int], beyond: Mapping[str, int], most: int = 15
) -> list[tuple[str | None, int, int, float, float]]:
    """(label, cells, cells beyond the reference, length of the bar within and beyond it in %), the largest first.

    More than `most` are summed up in a last one without a label and without a bar, which would dwarf the others.
    """
    ordered = sorted(composition.items(), key=lambda item: (-item[1], item[0]))
    shown, rest = (ordered, []) if len(ordered) <= most else (ordered[: most - 1], ordered[most - 1 :])
    found: list[tuple[str | None, int, int, float, float]] = []
    for label, n in shown:
        far, scale = beyond.get(label, 0), 100 / shown[0][1]
        found.append((label, n, far, scale * (n - far), scale * far))
    if rest:
        found.append((None, sum(n for _, n in rest), sum(beyond.get(label, 0) for label, _ in rest), 0.0, 0.0))
    return found
