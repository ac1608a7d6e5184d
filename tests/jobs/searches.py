"""Made searches to look at in tests: trials with curves as those of trainings, some stopped early, some failed."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from scarcade.jobs.tune_trial import Trial

SPACE: dict[str, dict[str, Any]] = {
    "model.n_latent": {"choice": [10, 20, 30]},
    "model.n_hidden": {"choice": [64, 128, 256]},
    "model.gene_likelihood": {"choice": ["zinb", "nb"]},
    "model.dropout_rate": {"uniform": [0.0, 0.4]},
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "data.batch_size": {"choice": [64, 128, 256, 512]},
}
DEFAULTS = {
    "model.n_latent": 10,
    "model.n_hidden": 128,
    "model.gene_likelihood": "zinb",
    "model.dropout_rate": 0.1,
    "optim.lr": 1e-3,
    "data.batch_size": 128,
}
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB; lower --data.batch-size or --model.n-hidden"


def searched(n: int, *, epochs: int = 30, seed: int = 0, mode: Literal["min", "max"] = "min") -> list[Trial]:
    """`n` trials: a tenth of them failed, of the others the worse half stopped early, as ASHA does."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        parameters: dict[str, Any] = {}
        for name, how in SPACE.items():
            kind, bounds = next(iter(how.items()))
            if kind == "choice":
                parameters[name] = bounds[int(rng.integers(len(bounds)))]
            elif kind == "uniform":
                parameters[name] = float(rng.uniform(*bounds))
            else:
                parameters[name] = float(np.exp(rng.uniform(*np.log(bounds))))
        found.append(_trial(f"trial-{i:04d}", parameters, epochs, rng, mode))
    values = sorted(value for trial in found if (value := trial.best("min")) is not None)
    middle = values[len(values) // 2] if values else 0.0
    return [_stopped(trial, i, middle, epochs) for i, trial in enumerate(found)]


def default_trial(*, epochs: int = 30, mode: Literal["min", "max"] = "min") -> Trial:
    return _trial("defaults", dict(DEFAULTS), epochs, np.random.default_rng(9), mode)


def _trial(
    name: str, parameters: dict[str, Any], epochs: int, rng: np.random.Generator, mode: Literal["min", "max"]
) -> Trial:
    away = np.log10(parameters["optim.lr"] / 2e-3)
    floor = 700 + 40 * away**2 + 60 * parameters["model.dropout_rate"] + 5 * abs(parameters["model.n_latent"] - 20) / 10
    floor += 8 * (parameters["model.gene_likelihood"] == "nb") + float(rng.normal(0, 3))
    speed = 1.5 + 6 * parameters["optim.lr"] ** 0.3 * 128 / parameters["data.batch_size"]
    t = np.arange(1, epochs + 1)
    curve = floor + 260 * np.exp(-t * speed / 9) + rng.normal(0, 0.6, epochs)
    if mode == "max":
        curve = 1 / (1 + np.exp((curve - 740) / 40))
    points = [(int(epoch), float(value)) for epoch, value in zip(t, curve, strict=True)]
    metrics = {"elbo": points[-1][1], "label_accuracy": float(rng.uniform(0.7, 0.95))}
    return Trial(name, parameters, "done", epochs, points, metrics, seconds=float(rng.uniform(30, 60)))


def _stopped(trial: Trial, i: int, middle: float, epochs: int) -> Trial:
    if i % 10 == 7:
        cut = (i // 10) % 4
        return replace(trial, state="failed", epochs=cut, curve=trial.curve[:cut], seconds=3.0, reason=OUT_OF_MEMORY)
    value = trial.best("min")
    if value is not None and value > middle:
        rung = max(1, epochs // (27 if value > 1.06 * middle else 9 if value > 1.03 * middle else 3))
        return replace(trial, state="stopped", epochs=rung, curve=trial.curve[:rung], seconds=trial.seconds / 3)
    return trial
