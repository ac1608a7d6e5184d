"""What one field of a configuration may be in a search: a few values, or a range.

Each kind draws a value from a generator that it is given, so a set of trials is a function of the seed, and says which
values should be tried on the real configuration before anything starts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scarcade.engine.errors import UsageError

KINDS = {
    "choice": "[values]",
    "grid": "[values]",
    "uniform": "[low, high]",
    "loguniform": "[low, high]",
    "quniform": "[low, high, step]",
    "randint": "[low, high]",
    "lograndint": "[low, high]",
}
"""Kind of a domain -> what it is given. Both ends of a range of whole numbers belong to it."""


@dataclass(frozen=True)
class Choice:
    """One of a few values; of a grid each of them is wanted."""

    values: tuple[Any, ...]
    grid: bool = False

    def drawn(self, rng: np.random.Generator) -> Any:
        """One of the values."""
        return self.values[int(rng.integers(len(self.values)))]

    def perturbed(self, value: Any, rng: np.random.Generator) -> Any:
        """A neighbour of `value`."""
        place = self.values.index(value) if value in self.values else 0
        place += int(rng.choice((-1, 1)))
        return self.values[min(max(place, 0), len(self.values) - 1)]

    def probes(self) -> list[Any]:
        """Values that should be tried before a search starts: all of them."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A number between `low` and `high`, drawn evenly or evenly in its logarithm, rounded to multiples of `step`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def drawn(self, rng: np.random.Generator) -> float | int:
        """A number of the range."""
        if self.whole and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.log:
            return self.within(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.within(float(rng.uniform(self.low, self.high)))

    def perturbed(self, value: float, rng: np.random.Generator) -> float | int:
        """`value` times 0.8 or 1.2, within the range (Jaderberg et al. 2017)."""
        return self.within(value * float(rng.choice((0.8, 1.2))))

    def within(self, value: float) -> float | int:
        """The number of the range that is nearest to `value`."""
        if self.step is not None:
            value = float(f"{round(value / self.step) * self.step:.12g}")  # 0.30000000000000004 is 0.3
            if value < self.low or value > self.high:  # ends that are no multiples
                value -= math.copysign(self.step, value - self.low)
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else value

    def probes(self) -> list[Any]:
        """Both ends, and a few between them: a whole number is wanted where 7.3 cannot be."""
        rng = np.random.default_rng(0)
        return [self.within(self.low), self.within(self.high), *(self.drawn(rng) for _ in range(2))]


Domain = Choice | Range


def domain_of(field: str, given: Any) -> Domain:
    """The domain that ``{kind = [...]}`` means.

    Raises:
        UsageError: it cannot be meant; names the field.
    """
    where = f"[space] {field}"
    if not isinstance(given, dict) or len(given) != 1:
        there_are = ", ".join(f"{{{kind} = {what}}}" for kind, what in KINDS.items())
        raise UsageError(f"{where}: wants one of {there_are} (given: {given!r})")
    kind, values = next(iter(given.items()))
    if kind not in KINDS:
        raise UsageError(f"{where}: there is no kind {kind!r}; there are {', '.join(KINDS)}")
    if not isinstance(values, list) or not values:
        raise UsageError(f"{where}: {kind} wants {KINDS[kind]} (given: {values!r})")
    if kind in ("choice", "grid"):
        if len({repr(value) for value in values}) < len(values):
            raise UsageError(f"{where}: {kind} holds a value twice ({values})")
        return Choice(tuple(values), grid=kind == "grid")
    return _range(where, kind, values)


def _range(where: str, kind: str, values: Sequence[Any]) -> Range:
    wanted = 3 if kind == "quniform" else 2
    whole, log = kind.endswith("randint"), kind.startswith("log")
    numbers = all(isinstance(value, int if whole else int | float) and not isinstance(value, bool) for value in values)
    if len(values) != wanted or not numbers or not all(math.isfinite(value) for value in values):
        of = "whole numbers" if whole else "numbers"
        raise UsageError(f"{where}: {kind} wants {KINDS[kind]}, {of} (given: {list(values)})")
    low, high = values[:2]
    if low >= high:
        raise UsageError(f"{where}: the low end of {kind} must be below the high end (given: {list(values)})")
    if log and low <= 0:
        raise UsageError(f"{where}: {kind} wants a low end above 0 (given: {low})")
    step = values[2] if kind == "quniform" else None
    if step is not None and not 0 < step <= high - low:
        raise UsageError(f"{where}: the step of quniform must be above 0 and fit into the range (given: {step})")
    low, high = (int(low), int(high)) if whole else (float(low), float(high))
    return Range(low, high, log=log, step=step, whole=whole)
