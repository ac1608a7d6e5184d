"""Bars, histograms and curves as text."""

import math
from typing import Any

from scarcade.jobs.report_charts import HEIGHT, POINTS, WIDTH, bars, curves, histogram


def test_bars_are_the_largest_first_and_the_rest_is_summed_up() -> None:
    assert bars({"a": 1, "b": 4}, {"b": 1}) == [("b", 4, 1, 75.0, 25.0), ("a", 1, 0, 25.0, 0.0)]
    many = bars({str(i): 10 for i in range(30)}, {"29": 3}, most=5)
    assert many[-1] == (None, 260, 3 - sum(far for _, _, far, _, _ in many[:-1]), 0.0, 0.0)
    assert sum(far for _, _, far, _, _ in many) == 3
    assert bars({}, {}) == []


def test_a_histogram_is_cut_in_two_with_the_same_scale() -> None:
    counts = [2, 4, 0, 1]
    assert histogram(counts).count("z") == 3
    assert histogram(counts, 0, 2) + histogram(counts, 2) == histogram(counts)
    assert histogram([0, 0]) == ""


def test_a_curve_has_few_points_within_its_frame() -> None:
    history: list[dict[str, Any]] = [{"epoch": i, "train/elbo": 100.0 / (i + 1)} for i in range(400)]
    history[3]["train/elbo"] = math.nan
    history[4]["train/elbo"] = None
    found = curves(history)
    assert found is not None
    points = [[float(part) for part in one.split()] for one in found["train"][1:].split("L")]
    assert len(points) == POINTS
    assert points[0] == [0, 0]
    assert points[-1] == [WIDTH, HEIGHT]
    assert found["validation"] == ""
    assert curves([]) is None
    assert curves([{"epoch": 0, "train/elbo": math.inf}]) is None
