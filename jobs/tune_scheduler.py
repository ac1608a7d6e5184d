"""Ray Tune's schedulers, and what they remember of an earlier start of the search.

A search that is continued must decide as one that was never stopped: the rungs of ASHA and the running means of the
median rule are filled again from the records of the trials, whether these are over or go on. HyperBand decides over
whole brackets, so it is shown everything again by the trials themselves (`SearchTrial`), which cost no training.
"""

import json
from typing import Any

import numpy as np
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from scarcade.jobs.tune_board import DEFAULTS, Board, is_over
from scarcade.jobs.tune_config import Mode, TuneConfig
from scarcade.jobs.tune_space import Space

METRIC, TIME = "objective", "epoch"
SHOWN_AGAIN = ("hyperband",)  # schedulers to which trials tell their past
POPULATION = ("hyperband", "pbt")  # schedulers that want all trials from the start, and pause them


def scheduler_of(config: TuneConfig, *, mode: Mode, epochs: int, space: Space, seed: int) -> TrialScheduler:
    """The scheduler that `config` names."""
    common: dict[str, Any] = {"time_attr": TIME, "metric": METRIC, "mode": mode}
    match config.scheduler:
        case "asha":
            grace = min(config.grace, epochs)
            return AsyncHyperBandScheduler(
                max_t=epochs, grace_period=grace, reduction_factor=config.reduction, **common
            )
        case "median":
            # it would else pause trials while there are too few to compare, which costs more than it gains
            common["min_time_slice"] = np.inf
            return MedianStoppingRule(grace_period=config.grace, **common)
        case "hyperband":
            return HyperBandScheduler(max_t=epochs, reduction_factor=config.reduction, **common)
        case "pbt":
            explore = _Explore(space, np.random.default_rng([seed, 1]))
            return PopulationBasedTraining(
                perturbation_interval=config.perturb, custom_explore_fn=explore, log_config=False, **common
            )
        case "fifo":
            return FIFOScheduler()  # type: ignore[no-untyped-call]


class _Explore:
    """How a trial that continues from another's weights differs from it: in what its optimiser is given."""

    def __init__(self, space: Space, rng: np.random.Generator) -> None:
        self._space = {field: domain for field, domain in space.items() if field.startswith("optim.")}
        self._rng = rng

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        trial = json.loads(config["trial"])
        parameters = trial["parameters"]
        for field, domain in self._space.items():
            if self._rng.random() < 0.25:
                parameters[field] = domain.drawn(self._rng)
            else:
                parameters[field] = domain.perturbed(parameters[field], self._rng)
        return {**config, "trial": json.dumps(trial)}


class Remembering(TrialScheduler):
    """A scheduler that knows the trials of the board, and leaves the defaults alone.

    Args:
        inner: decides. feed: tell it the past itself.
    """

    def __init__(self, inner: TrialScheduler, board: Board, *, feed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inner: Any = inner
        self._board, self._feed = board, feed
        self._known: set[str] = set()
        self.stopping = False  # no trial is begun any more

    @property
    def metric(self) -> str:
        return METRIC

    @property
    def supports_buffered_results(self) -> bool:
        return False

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if str(trial) == DEFAULTS:
            return
        if self._feed and not self._known:
            for past in self._board:
                if is_over(past) and past.name != DEFAULTS:
                    # Ray tells the last result of a trial that it stops a second time
                    last = past.curve[-1:] if past.state == "stopped" else []
                    self._tell(_Past(past.name), [*past.curve, *last])
        name = str(trial)
        if self._feed and name not in self._known:
            self._tell(trial, self._board[name].curve)
        self._known.add(name)
        self._inner.on_trial_add(tune_controller, trial)

    def _tell(self, trial: Any, curve: list[tuple[int, float]]) -> None:
        """Tell of each epoch as if it were the last: that is recorded and nothing is decided.

        (Told in another order than they came, trials would be stopped that in truth went on.)
        """
        for epoch, value in curve:
            self._inner.on_trial_add(None, trial)
            self._inner.on_trial_complete(None, trial, {TIME: epoch, METRIC: value})

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if str(trial) != DEFAULTS:
            self._inner.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if METRIC not in result:  # failed, or interrupted
            return str(TrialScheduler.STOP)
        if str(trial) == DEFAULTS:
            return str(TrialScheduler.CONTINUE)
        known = self._board[str(trial)].curve
        if self._feed and known and result[TIME] <= known[-1][0]:
            return str(TrialScheduler.CONTINUE)  # trained again after a crash
        return str(self._inner.on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if str(trial) == DEFAULTS:
            return
        if METRIC in result:
            self._inner.on_trial_complete(tune_controller, trial, result)
        elif "failed" in result:
            self._inner.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        if str(trial) != DEFAULTS:
            self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return None if self.stopping else self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self._inner.debug_string())


class _Past:
    """A trial of an earlier start that is over, as far as a scheduler looks at it."""

    def __init__(self, name: str) -> None:
        self.trial_id = name
