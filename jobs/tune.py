"""Searches the hyperparameters of a training with Ray Tune, and leaves the best of them. Resumes by itself.

::

    OUT/config.toml       the search as resolved; the same command again is held to it
    OUT/trials/NAME/      record, metrics and, while it is not over, checkpoints of each trial
    OUT/trials.csv .json  all trials
    OUT/best.toml         the best configuration, as `train --config` takes it
    OUT/report.html       curves and parallel coordinates
    OUT/refit/            with refit: the run of a reference trained on it
"""

import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from scarcade.dataloaders.loader import LoaderConfig, lanes_for
from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.config import checked, merged, nested
from scarcade.engine.errors import ClusterError, DataChangedError, InputError, UsageError
from scarcade.engine.interrupts import interruptible
from scarcade.engine.scale import Scale
from scarcade.engine.storage import is_url
from scarcade.jobs.console import record
from scarcade.jobs.programs import programs_given
from scarcade.jobs.run_folder import CONFIG, RunFolder
from scarcade.jobs.train import normalises_apart, train
from scarcade.jobs.train_config import TrainConfig
from scarcade.jobs.train_work import built
from scarcade.jobs.tune_board import DEFAULTS, Board
from scarcade.jobs.tune_config import Mode, Objective, TuneConfig
from scarcade.jobs.tune_optuna import check_optuna
from scarcade.jobs.tune_report import write_report
from scarcade.jobs.tune_run import Job, run_trials
from scarcade.jobs.tune_scheduler import POPULATION
from scarcade.jobs.tune_scores import check_metrics
from scarcade.jobs.tune_space import (
    Fixed,
    all_parameters,
    check_space,
    defaults_of,
    described,
    random_parameters,
    space_of,
)
from scarcade.jobs.tune_trial import Trial
from scarcade.jobs.tune_written import BEST, REPORT, write_best, write_tables

__all__ = ["Search", "tune"]

TRIALS, REFIT = 20, "refit"
Progress = Callable[[Mapping[str, Any]], None]
"""Given ``{"note": sentence}``, ``{"warning": sentence}``, ``{"about": ...}`` or ``{"trials": [Trial, ...]}``."""
_FREE = (
    "scale.",
    *(f"tune.{name}" for name in ("concurrent", "retries", "retry_failed", "defaults")),
    "fixed.optim.log_every",
)


@dataclass(frozen=True)
class Search:
    """A search that is over."""

    path: Path
    objective: str
    mode: Mode  # whether less or more of it is better
    best: Trial
    trials: list[Trial] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)  # the best configuration, as `train` takes it
    value: float  # of the objective, of the best
    model: Path | None = None  # of the reference that was trained on it, where that was asked for

    def told(self) -> str:
        """What a person wants to know first."""
        states = Counter(trial.state for trial in self.trials)
        counts = ", ".join(f"{states[state]} {state}" for state in ("done", "stopped", "failed") if states[state])
        known = {f"--{name.replace('_', '-')}": value for name, value in self.best.parameters.items()}
        known = {"trials": counts, "best": f"{self.best.name}, {self.objective} {self.value:.6g}", **known}
        usual = next((trial for trial in self.trials if trial.name == DEFAULTS), None)
        if usual is not None and (value := usual.best(self.mode)) is not None:
            known["defaults"] = f"{self.objective} {value:.6g}"
        known |= {"configuration": self.path / BEST, "report": self.path / REPORT}
        return record(known | ({"model": self.model} if self.model else {}))


def tune(
    data: str | Path | Store,
    model: str | None = None,
    *,
    out: str | Path,
    space: Mapping[str, Any],
    trials: int | None = None,
    objective: str | Mapping[str, Any] | None = None,
    recipe: str | None = None,
    init_from: str | Path | None = None,
    update: str | Path | None = None,
    programs: Sequence[str | Path] | Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    refit: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Search:
    """Search the space, and leave tables, a report and the best configuration in `out`. The same call again continues.

    Args:
        space: field of the configuration -> what it may be: ``{"optim.lr": {"loguniform": [1e-4, 1e-2]}}``. Kinds:
            `tune_domain.KINDS`.
        trials: how many (20; with ``tune.search = "grid"`` every combination).
        objective: a metric, or the fields of `Objective`; default: the ELBO of the held-out cells.
        epochs: that a trial is trained for at most.
        workers: that each trial is trained on, as in `train`; all of them begin together. threads: of each worker.
        refit: train a reference on the best configuration to ``out/refit``.
        data, model, recipe, init_from, update, programs, seed, batch_size, settings: as `train` takes them, the same
            for all trials; `settings` may have the fields of `TuneConfig` under ``tune``.

    Raises:
        UsageError: a field, value or combination that cannot be meant, found before anything starts.
        InputError, ClusterError: not one trial succeeded.
        DataChangedError: the store is not the one that the search began with. BusyError: another process works on it.
    """
    own = checked(LoaderConfig, nested(settings or {}).get("data", {}), prefix="data.")
    store = data if isinstance(data, Store) else open_store(data, cache=(own.cache, own.cache_gb))
    if is_url(out):
        raise UsageError(f"--out {out}: a search is kept in a folder; give a path, on a cluster one that all nodes see")
    given = nested(settings or {})
    config = checked(TuneConfig, given.pop("tune", {}), prefix="tune.")
    wanted = checked(
        Objective, {"metric": objective} if isinstance(objective, str) else objective or {}, prefix="objective."
    )
    direct: dict[str, Any] = {"optim.epochs": epochs, "data.batch_size": batch_size}
    direct |= {"scale.workers": workers, "scale.threads": threads}
    direct |= {"init_from": _absolute(init_from), "update": _absolute(update)}
    direct["model.programs"] = programs_given(programs)
    given = merged(given, nested({name: value for name, value in direct.items() if value is not None}))
    if given.get("log", {}).get("to") and not refit:
        raise UsageError(
            "--log.to: curves are those of one training; a search has its report; give --refit, or leave it out"
        )
    folder = RunFolder(out)
    if "lanes" not in given.get("data", {}):
        given = merged(given, _begun_lanes(folder, given))
    job, parameters = _job(store, given, config, wanted, space, name=model, recipe=recipe, seed=seed, trials=trials)
    mode, tell = job.objective.better(), progress or _plain
    with folder.locked():
        folder.sweep()
        _check_data(folder, store)
        folder.settle(_as_toml(job, space), free=_FREE, may_grow=("trials",))
        for sentence in _notices(job):
            tell({"note": sentence})
        board = _board(folder.local, job, mode, parameters)
        about = {"title": job.objective.title, "mode": mode, "n_trials": job.n_trials, "epochs": job.epochs}
        tell({"about": about})
        if board.n_sampled < job.n_trials or board.left():
            with interruptible() as interrupts:
                run_trials(job, board, tell, interrupts)
        else:
            interrupts = None
            tell({"note": f"all {len(board)} trials are done already; more with --trials"})
        tell({"trials": list(board)})
        write_tables(board, {**about, "space": described(job.space, space), "data": store.fingerprint})
        if interrupts is not None and interrupts():
            tell({"note": f"stopped with {len(board.left())} trials to go on with; the same command continues"})
            interrupts.pass_on()
        best = _best(board, job)
        _write(board, job, best, space, tell)
        trained = _refit(folder.local, job, best, tell) if refit else None
    whole = job.fixed.config(best.parameters, store).model_dump(mode="json", exclude_none=True)
    value = best.best(mode)
    assert value is not None
    return Search(folder.local, job.objective.title, mode, best, list(board), whole, value, trained)


def _begun_lanes(folder: RunFolder, given: Mapping[str, Any]) -> dict[str, Any]:
    """The lanes that the search in `folder` began with, where they are not those of any search of a few workers.

    It keeps them when it is continued on more workers, or fewer: in other lanes its trials would see other batches.
    """
    usual = lanes_for(0)
    try:
        lanes = tomllib.loads((folder.local / CONFIG).read_text())["fixed"].get("data", {}).get("lanes", usual)
    except FileNotFoundError:
        lanes = lanes_for(checked(Scale, given.get("scale", {}), prefix="scale.").workers)
    except (OSError, ValueError, KeyError):
        return {}  # not a search's, as `settle` will say
    return {"data": {"lanes": lanes}} if lanes != usual else {}


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _job(
    store: Store,
    given: dict[str, Any],
    config: TuneConfig,
    objective: Objective,
    table: Mapping[str, Any],
    *,
    name: str | None,
    recipe: str | None,
    seed: int,
    trials: int | None,
) -> tuple[Job, list[dict[str, Any]] | None]:
    """The search, checked against the store and the real configuration; with the parameters of a grid."""
    if given.get("scale", {}).get("gpus") and not config.gpus:
        config = config.model_copy(update={"gpus": 1.0})
    space = space_of(table)
    fixed = Fixed(given, name=name, recipe=recipe, seed=seed)
    base = fixed.config({}, store)
    _check_fixed(given, base, config.gpus)
    check_metrics(objective.names, store, base.data.validation)
    objective.better()
    check_space(space, fixed, store)
    parameters = None
    if config.search == "optuna":
        check_optuna()
        if config.scheduler in POPULATION:
            raise UsageError(
                f"--tune.search optuna: does not go with --tune.scheduler {config.scheduler}, which wants all trials "
                "from the start; take random, or asha"
            )
    if config.search == "grid":
        parameters = all_parameters(space)
        if trials is not None and trials != len(parameters):
            raise UsageError(f"--trials {trials}: the grid has {len(parameters)} combinations; leave --trials out")
        trials = len(parameters)
    elif grids := [field for field, domain in space.items() if getattr(domain, "grid", False)]:
        raise UsageError(f"[space] {grids[0]}: a grid is for --tune.search grid; else give a choice")
    if config.scheduler == "pbt" and not any(field.startswith("optim.") for field in space):
        raise UsageError("--tune.scheduler pbt: changes fields of [optim] while it trains; the space has none")
    n_trials = TRIALS if trials is None else trials
    if n_trials < 1:
        raise UsageError(f"--trials {n_trials}: must be at least 1")
    if config.scheduler == "pbt" and n_trials < 2:
        raise UsageError(f"--trials {n_trials}: a population (--tune.scheduler pbt) wants at least 2")
    assert base.optim.epochs is not None
    return (
        Job(fixed, space, objective, config, base.scale, store, n_trials, base.optim.epochs, seed),
        parameters,
    )


def _check_fixed(given: Mapping[str, Any], base: TrainConfig, gpus: float) -> None:
    workers, lanes = base.scale.workers, base.data.lanes
    if base.scale.min_workers is not None:
        raise UsageError("--scale.min-workers: a trial has all its workers, or waits for them; leave it out")
    if workers > 1 and 0 < gpus < 1:
        raise UsageError(
            f"--tune.gpus {gpus:g}: with --workers {workers} each worker needs a GPU of its own (nccl takes no shared "
            "ones); give --tune.gpus 1, or leave --workers out"
        )
    if lanes is not None and lanes < workers:
        raise UsageError(
            f"--workers {workers}: is more than --data.lanes {lanes}, the stretches of the store that they share "
            "(which a search keeps that has begun); lower --workers"
        )
    optim = given.get("optim", {})
    if optim.get("max_steps") is not None:
        raise UsageError("--optim.max-steps: trials are compared by epochs; give --epochs")
    if str(optim.get("validate_every", 1)) != "1":
        raise UsageError("--optim.validate-every: trials are compared after every epoch; leave it out")


def _notices(job: Job) -> list[str]:
    """What a person should know before the search."""
    config = job.fixed.config({}, job.store)
    if config.update is not None or config.scale.workers < 2:
        return []
    with torch.device("meta"):
        return normalises_apart(config, built(config, job.store.schema))


def _as_toml(job: Job, table: Mapping[str, Any]) -> str:
    """What a search is held to when it is continued."""
    raw: dict[str, Any] = {
        "trials": job.n_trials,
        "epochs": job.epochs,
        "space": described(job.space, table),
        "objective": job.objective.model_dump(mode="json", exclude_none=True),
        "tune": job.config.model_dump(mode="json", exclude_none=True),
        "fixed": {key: value for key, value in job.fixed.record().items() if value is not None and key != "given"},
        "scale": job.scale.model_dump(mode="json", exclude_none=True),
        "store": job.store.fingerprint,
    }
    for section, values in job.fixed.given.items():
        if section not in ("scale", "checkpoint"):
            raw["fixed"][section] = _plain_values(values)
    return tomli_w.dumps(raw)


def _check_data(folder: RunFolder, store: Store) -> None:
    """Raises DataChangedError where the search in `folder` began with another store."""
    try:
        before = tomllib.loads((folder.local / CONFIG).read_text()).get("store", store.fingerprint)
    except (OSError, ValueError):
        return  # a new search, or one whose file `settle` will speak of
    if before != store.fingerprint:
        raise DataChangedError(
            f"--out {folder.place}: this search began with other data than {store.where}; give those, or another --out"
        )


def _plain_values(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _plain_values(value) for name, value in values.items() if value is not None}
    return list(values) if isinstance(values, tuple) else values


def _board(out: Path, job: Job, mode: Mode, parameters: list[dict[str, Any]] | None) -> Board:
    """The trials that are known, and those that are not begun."""
    board = Board(out, mode)
    board.load()
    for trial in list(board):
        if trial.state == "failed" and job.config.retry_failed:
            board.put(replace(trial, state="waiting", reason=None))
    if job.config.defaults and DEFAULTS not in board:
        board.put(Trial(DEFAULTS, defaults_of(job.space, job.fixed, job.store)))
    if job.config.search == "optuna":
        return board  # which makes them as it goes
    for number in range(job.n_trials):
        name = f"trial-{number:04d}"
        if name not in board:
            own = parameters[number] if parameters is not None else random_parameters(job.space, job.seed, number)
            board.put(Trial(name, own))
    return board


def _best(board: Board, job: Job) -> Trial:
    """The best trial.

    Raises:
        InputError, ClusterError: there is none.
    """
    best = board.best()
    if best is not None:
        return best
    reasons = Counter(trial.reason or "no reason" for trial in board)
    reason, times = reasons.most_common(1)[0]
    kind = ClusterError if reason.startswith("its process died") else InputError
    raise kind(f"--out {board.out}: all {len(board)} trials failed; {times} of them: {reason}")


def _write(board: Board, job: Job, best: Trial, table: Mapping[str, Any], tell: Progress) -> None:
    """``best.toml`` and ``report.html``."""
    value, title = best.best(board.mode), job.objective.title
    sentence = f"{best.name} of {len(board)} trials: {title} {value:.6g} after {best.epochs} of {job.epochs} epochs"
    write_best(board.out, job.fixed.config(best.parameters, job.store), sentence)
    failed = [trial.name for trial in board if trial.state == "failed"]
    if failed:
        tell({"warning": f"{len(failed)} of {len(board)} trials failed, as trials.csv says: {', '.join(failed[:5])}"})
    write_report(
        board.out / REPORT,
        title=f"{job.fixed.name or 'scvi'} on {Path(job.store.place).name}",
        objective=title,
        mode=board.mode,
        space=described(job.space, table),
        trials=list(board),
        defaults=next((trial for trial in board if trial.name == DEFAULTS), None),
    )


def _refit(out: Path, job: Job, best: Trial, tell: Progress) -> Path:
    """Train the reference; a refit that is there continues or is finished."""
    own = dict(best.parameters)
    recipe, seed = own.pop("recipe", job.fixed.recipe), own.pop("seed", job.seed)
    given = merged(job.fixed.given, nested(own))
    given = merged(given, {"optim": {"epochs": job.epochs}})
    if job.config.gpus:
        given = merged(given, {"scale": {"gpus": True}})
    tell({"note": f"training the reference on {best.name}, the best, to {out / REFIT}"})
    done = train(job.store, job.fixed.name, out=out / REFIT, recipe=recipe, seed=seed, settings=given, progress=tell)
    return Path(done.path) / "model"


def _plain(message: Mapping[str, Any]) -> None:
    """Without anybody who shows progress, warnings are warnings and the rest is silence."""
    if "warning" in message:
        warnings.warn(str(message["warning"]), UserWarning, stacklevel=2)
