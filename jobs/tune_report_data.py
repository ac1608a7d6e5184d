"""What the report of a search draws: from trials to plain values, before any HTML.

An objective may be anything, also not a number: what is not finite counts as not there. One trial that went astray must
not squeeze all others into a line, so the range that is drawn ends where outliers begin (Tukey's far fence), and what
lies beyond is drawn on its edge.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scarcade.jobs.report_words import short
from scarcade.jobs.tune_trial import Trial

Mode = Literal["min", "max"]
SHADES = 9  # colours from the worst trial to the best
POINTS = 120  # of a curve that are drawn, at the most
VALUES = 40  # of a parameter that is chosen from a list: places on its axis, at the most
FENCE = 3.0  # interquartile ranges


@dataclass(frozen=True)
class Ranked:
    """A trial among others."""

    trial: Trial
    best: float | None  # the best finite objective that it reached
    at: int | None  # the epoch of that
    is_default: bool = False

    @property
    def usable(self) -> bool:
        """Whether it can be the best one of all."""
        return self.best is not None and self.trial.state != "failed"


def ranked(trials: Sequence[Trial], mode: Mode, defaults: Trial | None) -> list[Ranked]:
    """The trials in their order, the one with the defaults behind them if it is not among them."""
    every = [*trials]
    if defaults is not None and defaults.name not in {trial.name for trial in trials}:
        every.append(defaults)
    found = []
    for trial in every:
        points = finite(trial.curve)
        value = (min if mode == "min" else max)((y for _, y in points), default=None)
        at = next((epoch for epoch, y in points if y == value), None)
        found.append(Ranked(trial, value, at, defaults is not None and trial.name == defaults.name))
    return found


def finite(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points of a curve whose objective is a finite number, by epoch."""
    points = [(int(epoch), float(y)) for epoch, y in curve if isinstance(y, int | float) and math.isfinite(y)]
    return sorted(points, key=lambda point: point[0])


def by_rank(every: Sequence[Ranked], mode: Mode) -> list[int]:
    """Places of the trials, the best first, those without a value last; of equals the one that was trained longest."""
    sign = 1 if mode == "min" else -1

    def key(place: int) -> tuple[bool, float, int]:
        one = every[place]
        return one.best is None, sign * (one.best or 0.0), -one.trial.epochs

    return sorted(range(len(every)), key=key)


def best_of(every: Sequence[Ranked], mode: Mode) -> int | None:
    """The place of the best trial; None while none has a value. One that failed has left no model."""
    return next((place for place in by_rank(every, mode) if every[place].usable), None)


def shades(every: Sequence[Ranked], mode: Mode) -> list[int | None]:
    """Colour of each trial by its rank: `SHADES` - 1 is best, 0 worst; None without a value."""
    order = [place for place in by_rank(every, mode) if every[place].best is not None]
    found: list[int | None] = [None] * len(every)
    for rank, place in enumerate(order):
        found[place] = SHADES - 1 - rank * SHADES // len(order)
    return found


def fenced(values: Sequence[float], mode: Mode) -> tuple[float, float] | None:
    """(low, high) of the values, without outliers on the worse side; None without values."""
    if not len(values):
        return None
    array = np.asarray(values, float)
    lower, upper = np.quantile(array, [0.25, 0.75])
    reach = FENCE * (upper - lower)
    if mode == "min":
        return float(array.min()), float(array[array <= upper + reach].max())
    return float(array[array >= lower - reach].min()), float(array.max())


def reached(every: Sequence[Ranked], mode: Mode) -> tuple[float, float] | None:
    """(low, high) of the objective that is drawn against parameters; None while there is no value.

    Trials that were stopped after an epoch lie far behind those that were trained to the end, which are what is to be
    told apart: their range takes up a third at the least.
    """
    whole = fenced([_value(one) for one in every if one.best is not None], mode)
    ends = [_value(one) for one in every if one.best is not None and one.trial.state == "done"]
    span = fenced(ends, mode) if len(ends) > 2 else whole
    if whole is None or span is None or span[0] == span[1]:
        return whole
    room = 3 * (span[1] - span[0])
    return (whole[0], min(whole[1], whole[0] + room)) if mode == "min" else (max(whole[0], whole[1] - room), whole[1])


def axes(space: Mapping[str, Mapping[str, Any]], every: Sequence[Ranked]) -> list[dict[str, Any]]:
    """An axis for each parameter: those of the space, then those that trials have besides.

    Numbers from a range lie on a linear axis or, if they are drawn by their logarithm, on a logarithmic one; all else
    has a place for each value, in the order of the space. Population based training leaves the ranges: axes hold all
    values that occur.
    """
    names = [*space, *sorted({name for one in every for name in one.trial.parameters} - set(space))]
    return [_axis(name, space.get(name, {}), every) for name in names]


def _axis(name: str, how: Mapping[str, Any], every: Sequence[Ranked]) -> dict[str, Any]:
    given = [one.trial.parameters[name] for one in every if name in one.trial.parameters]
    kind, bounds = next(iter(how.items()), ("", None))
    listed = kind in ("choice", "grid") or not all(map(_is_number, given)) or (not how and len(set(given)) < 8)
    if listed:
        options = (
            bounds
            if isinstance(bounds, list | tuple)
            else sorted(given, key=lambda v: (not _is_number(v), v if _is_number(v) else 0))
        )
        texts = list(dict.fromkeys(text_of(value) for value in [*options, *given]))
        return {"name": short(name), "kind": "choice", "values": texts[:VALUES]}
    limits = [float(value) for value in bounds or () if _is_number(value)][:2] + [float(value) for value in given]
    low, high = (min(limits), max(limits)) if limits else (0.0, 1.0)
    shape = "log" if "log" in kind and low > 0 else "linear"
    return {"name": short(name), "kind": shape, "low": low, "high": high, "whole": "int" in kind}


def place_on(axis: Mapping[str, Any], one: Ranked, name: str) -> float | None:
    """Where a trial lies on an axis: its value, or the number of its value in the list; None if it has none."""
    if name not in one.trial.parameters:
        return None
    value = one.trial.parameters[name]
    if axis["kind"] != "choice":
        return float(value)
    text = text_of(value)
    return axis["values"].index(text) if text in axis["values"] else None


def drawing(
    every: Sequence[Ranked], objective: str, mode: Mode, space: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What the page's script draws."""
    dimensions = axes(space, every)
    names = [*space, *sorted({name for one in every for name in one.trial.parameters} - set(space))]
    return {
        "objective": short(objective),
        "mode": mode,
        "axes": dimensions,
        "range": reached(every, mode),
        "curves": fenced([y for one in every for _, y in finite(one.trial.curve)], mode),
        "best": best_of(every, mode),
        "trials": [
            {
                "name": short(one.trial.name),
                "state": one.trial.state,
                "default": one.is_default,
                "epochs": one.trial.epochs,
                "value": rounded(one.best),
                "at": one.at,
                "shade": shade,
                "curve": _thinned(one, mode),
                "places": [rounded(place_on(axis, one, name)) for axis, name in zip(dimensions, names, strict=True)],
            }
            for one, shade in zip(every, shades(every, mode), strict=True)
        ],
    }


def _thinned(one: Ranked, mode: Mode) -> list[list[float]]:
    """The epochs and the objective of a curve; of many points the first, the last, the best and some between."""
    points = finite(one.trial.curve)
    if len(points) > POINTS:
        kept = {round(i * (len(points) - 1) / (POINTS - 2)) for i in range(POINTS - 1)}
        kept.add(next(i for i, (epoch, _) in enumerate(points) if epoch == one.at))
        points = [points[i] for i in sorted(kept)]
    return [[epoch for epoch, _ in points], [rounded(y) or 0.0 for _, y in points]]


def text_of(value: Any) -> str:
    """A parameter's value as TOML and JSON write it, but text without quotes."""
    if isinstance(value, str):
        return short(value)
    if isinstance(value, float):
        return number(value)
    return short(json.dumps(value, default=str))


def number(value: float) -> str:
    """``0.00123``, ``1.2e-05``, ``812.3``, ``12,346``: four figures, and all before the point."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"


def rounded(value: float | None) -> float | None:
    """Six figures: no picture shows more, and a page of a thousand trials is half as large."""
    return None if value is None else float(f"{value:.6g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _value(one: Ranked) -> float:
    assert one.best is not None
    return one.best
