"""What a search is told beside its space: what is better, who is stopped when, and how many run at a time."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from scarcade.engine.config import Section
from scarcade.engine.errors import NonFiniteError, UsageError
from scarcade.jobs.tune_scores import METRICS, SCORES

Mode = Literal["min", "max"]


class Objective(Section):
    """What the trials are compared by, on the held-out cells."""

    metric: str = Field("elbo", description="What is compared: a loss of the validation, or a score of the latent.")
    weights: dict[str, Any] = Field({}, description="Instead of one metric a sum: {total = 1.0, label_accuracy = 0.5}.")
    mode: Mode | None = Field(None, description="Which is better; default: as it is with the metric.")

    @field_validator("weights")
    @classmethod
    def _numbers(cls, weights: dict[str, Any]) -> dict[str, float]:
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"the weight of {name} must be a number")
        return {name: float(weight) for name, weight in weights.items()}

    @property
    def names(self) -> list[str]:
        """The metrics that it is made of."""
        return list(self.weights) or [self.metric]

    @property
    def scores(self) -> list[str]:
        """Those of them that are computed from the latent."""
        return [name for name in self.names if name in SCORES]

    @property
    def title(self) -> str:
        """How it is called in tables."""
        if not self.weights:
            return self.metric
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    def better(self) -> Mode:
        """Whether less or more is better.

        Raises:
            UsageError: the metrics of a sum disagree, and no mode was given.
        """
        if self.mode is not None:
            return self.mode
        modes: set[Mode] = set()
        for name in self.names:
            flipped = self.weights.get(name, 1.0) < 0
            modes.add(METRICS[name].mode if not flipped else "min" if METRICS[name].mode == "max" else "max")
        if len(modes) > 1:
            raise UsageError(
                f"[objective] {self.title}: of some of these less is better, of others more; weigh the ones with a "
                'minus sign, or say which the sum is by mode = "min" or "max"'
            )
        return modes.pop()

    def value(self, found: Mapping[str, float]) -> float:
        """The objective, of the metrics in `found`.

        Raises:
            NonFiniteError: it is not finite.
        """
        weights = self.weights or {self.metric: 1.0}
        value = float(sum(weight * found[name] for name, weight in weights.items()))
        if not math.isfinite(value):
            raise NonFiniteError(f"the objective ({self.title}) is not finite: {dict(found)}")
        return value


class TuneConfig(Section):
    """How a search goes about it."""

    scheduler: Literal["asha", "median", "hyperband", "pbt", "fifo"] = Field(
        "asha", description="Which trials are stopped early; pbt: bad ones continue from good ones; fifo: none."
    )
    search: Literal["random", "grid", "optuna"] = Field("random", description="Where configurations come from.")
    concurrent: int | None = Field(None, ge=1, description="Trials at a time; default: as many as the cores allow.")
    gpus: float = Field(0.0, ge=0, description="GPUs of each worker of a trial; 0.5: two trials share one.")
    grace: int = Field(1, ge=1, description="Epochs before a trial can be stopped (asha, median).")
    reduction: float = Field(4.0, gt=1, description="At each rung one of so many trials goes on (asha, hyperband).")
    perturb: int = Field(4, ge=1, description="Epochs between two exchanges within the population (pbt).")
    retries: int = Field(2, ge=0, description="How often a trial whose process died goes on from its checkpoint.")
    defaults: bool = Field(False, description="Train the defaults too, to the end and beside the trials, to compare.")
    retry_failed: bool = Field(False, description="Run trials again that failed in an earlier start.")

    @model_validator(mode="after")
    def _sensible(self) -> "TuneConfig":
        if 1 < self.gpus != int(self.gpus):
            raise ValueError(f"gpus ({self.gpus}) must be a whole number or less than 1")
        return self
