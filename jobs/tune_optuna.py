"""Optuna as a source of configurations: its tree-structured Parzen estimator asks where good trials were found.

What it suggests depends on the trials that are over by then, so two searches of one seed agree only as long as they
run one trial at a time. Trials of an earlier start are told to it first.
"""

from typing import Any

from ray.tune.search import Searcher

from scarcade.engine.errors import UsageError
from scarcade.jobs.tune_board import DEFAULTS, Board, as_config, is_over
from scarcade.jobs.tune_domain import Choice, Domain
from scarcade.jobs.tune_space import Parameters, Space
from scarcade.jobs.tune_trial import Trial


def check_optuna() -> None:
    """Raises UsageError where it is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UsageError(
            '--tune.search optuna: optuna is not installed; pip install "scarcade[tune]", or take random'
        ) from error


class OptunaSearch(Searcher):
    """Suggests the trials of the board that wait, then new ones until there are `n_trials`."""

    def __init__(self, board: Board, space: Space, *, n_trials: int, seed: int) -> None:
        import optuna
        from optuna.study import StudyDirection

        super().__init__(metric="objective", mode=board.mode)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._board, self._space, self._n = board, space, n_trials
        self._distributions = {field: _distribution(domain) for field, domain in space.items()}
        direction = StudyDirection.MINIMIZE if board.mode == "min" else StudyDirection.MAXIMIZE
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), direction=direction)
        self._waiting = [trial for trial in board if not is_over(trial)]
        self._names: dict[str, str] = {}  # Ray's identity of a trial -> its name
        self._asked: dict[str, Any] = {}  # name -> Optuna's trial
        self._stopping = False
        for trial in board:
            if is_over(trial):
                self._add(trial)

    def stop(self) -> None:
        """No new trial is suggested any more."""
        self._stopping = True

    def suggest(self, trial_id: str) -> Any:
        if self._stopping:
            return Searcher.FINISHED
        if self._waiting:
            trial = self._waiting.pop(0)
        elif self._board.n_sampled < self._n:
            trial = self._new()
        else:
            return Searcher.FINISHED
        self._names[trial_id] = trial.name
        return {"trial": as_config(trial)}

    def _new(self) -> Trial:
        asked = self._study.ask(self._distributions)
        parameters: Parameters = {field: _value(self._space[field], given) for field, given in asked.params.items()}
        trial = Trial(f"trial-{self._board.n_sampled:04d}", {field: parameters[field] for field in self._space})
        self._board.put(trial)
        self._asked[trial.name] = asked
        return trial

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        from optuna.trial import TrialState

        trial = self._board[self._names[trial_id]]
        asked = self._asked.pop(trial.name, None)
        if result is not None and "interrupted" in result:
            return
        if asked is None:  # of an earlier start
            self._add(trial)
        elif error or not trial.curve or (result is not None and "failed" in result):
            self._study.tell(asked, state=TrialState.FAIL)
        else:
            for epoch, value in trial.curve:
                asked.report(value, epoch)
            over = result is not None and result.get("over")
            value = trial.curve[-1][1]
            self._study.tell(asked, value if over else None, state=None if over else TrialState.PRUNED)

    def _add(self, trial: Trial) -> None:
        """Tell the study of a trial that it did not suggest in this start."""
        from optuna.trial import TrialState, create_trial

        if (
            trial.name == DEFAULTS
            or trial.state == "failed"
            or not trial.curve
            or set(trial.parameters) != set(self._space)
        ):
            return
        done = trial.state == "done"
        self._study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if done else TrialState.PRUNED,
                params={field: _given(self._space[field], value) for field, value in trial.parameters.items()},
                distributions=self._distributions,
                value=trial.curve[-1][1] if done else None,
                intermediate_values=dict(trial.curve),
            )
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records of the trials are enough."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""


def _distribution(domain: Domain) -> Any:
    """The domain as Optuna has it; of a choice the places of its values, which need not be numbers."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):
        return CategoricalDistribution(tuple(range(len(domain.values))))
    if domain.whole:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def _value(domain: Domain, given: Any) -> Any:
    return domain.values[given] if isinstance(domain, Choice) else domain.within(given)


def _given(domain: Domain, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, Choice) else value
