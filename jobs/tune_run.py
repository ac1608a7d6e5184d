"""Runs the trials of a search with Ray Tune: the driver's side.

Ray Tune places the trials, starts dead ones again and asks its schedulers; records, checkpoints and progress are ours.
What it would keep itself goes to a scratch folder that is removed, and none of it is ever read again.
"""

import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from scarcade.dataloaders.store import Store
from scarcade.engine.cluster import Room, cluster
from scarcade.engine.cores import cores
from scarcade.engine.errors import ClusterError, ScarcadeError
from scarcade.engine.interrupts import Interrupts
from scarcade.engine.mailbox import Mailbox
from scarcade.engine.scale import Scale
from scarcade.jobs.tune_board import Board, as_config
from scarcade.jobs.tune_config import Objective, TuneConfig
from scarcade.jobs.tune_optuna import OptunaSearch
from scarcade.jobs.tune_scheduler import POPULATION, SHOWN_AGAIN, Remembering, scheduler_of
from scarcade.jobs.tune_space import Fixed, Space
from scarcade.jobs.tune_trainable import STOP, SearchTrial
from scarcade.jobs.tune_trial import State

_POLL_S = 0.2
_PATIENCE_S = 60.0  # how long trials may take to stop when they are asked to
_LOOK_S = 5.0
_SWITCHES = {
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables are printed even when it is told to be silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no objective
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class Job:
    """A search: what is fixed, what is searched and how."""

    fixed: Fixed
    space: Space
    objective: Objective
    config: TuneConfig
    scale: Scale
    store: Store
    n_trials: int
    epochs: int
    seed: int


@dataclass(frozen=True)
class Share:
    """What each trial is given, and how many there are at a time."""

    concurrent: int | None  # None: as many as the cluster has room for
    workers: int  # of each trial, which are given cores and threads each
    cpus: float
    threads: int
    machine: int  # cores that a private session has to give

    @classmethod
    def of(cls, job: Job, *, private: bool) -> "Share":
        """The share that the configuration means, on the cores of this machine or of a cluster."""
        scale, here = job.scale, cores()
        concurrent, cpus, workers = job.config.concurrent, scale.cpus_per_worker, max(1, scale.workers)
        if not private:
            threads = scale.threads or max(1, int(cpus or 1))
            return cls(concurrent, workers, cpus or float(threads), threads, here)
        if concurrent is None:
            concurrent = max(1, int(here / (cpus or scale.threads or 1) / workers))
        concurrent = max(1, min(concurrent, job.n_trials))
        total = concurrent * workers
        threads = scale.threads or max(1, int(cpus or here // total))
        machine = max(1, -int(-total * (cpus or threads) // 1))
        # of what the session has exactly so many have room, whatever the scheduler: some cannot be limited otherwise
        return cls(concurrent, workers, int(machine / total * 1e4) / 1e4, threads, machine)

    def resources(self, gpus: float) -> Any:
        """What Ray Tune is to reserve for a trial, with so many `gpus` for each of its workers.

        For several workers it is one placement group, had as a whole or not at all: trials never wait for each other
        with half of their workers begun.
        """
        if self.workers == 1:
            return {"cpu": self.cpus} | ({"gpu": gpus} if gpus else {})
        return tune.PlacementGroupFactory([{"CPU": self.cpus, "GPU": gpus}] * self.workers, strategy="PACK")


def run_trials(job: Job, board: Board, tell: Callable[[Mapping[str, Any]], None], interrupts: Interrupts) -> None:
    """Run what is left to do on the board, until all is over or a signal came.

    Raises:
        ClusterError: Ray could not be reached, or has no room for a trial.
    """
    private = job.scale.address is None and not os.environ.get("RAY_ADDRESS")
    share = Share.of(job, private=private)
    pending = job.n_trials + 1 if job.config.scheduler in POPULATION else share.concurrent or 16
    switches = {**_SWITCHES, "TUNE_MAX_PENDING_TRIALS_PG": str(max(1, pending))}
    with _environment(switches), _scratch(board.out) as scratch, _quiet_ray():
        needs_gpu = job.config.gpus > 0
        with cluster(job.scale.address, cpus=share.machine, gpus=None if needs_gpu else 0 if private else None):
            needed = {"CPU": share.cpus} | ({"GPU": min(job.config.gpus, 1.0)} if needs_gpu else {})
            room = Room(needed, job.scale.start_seconds, group=share.workers)
            room.wait()
            _Attended(job, board, share, scratch, tell, room).run(interrupts)


class _Attended:
    """Ray Tune in a thread of its own, while this one shows progress and passes signals on."""

    def __init__(
        self,
        job: Job,
        board: Board,
        share: Share,
        scratch: Path,
        tell: Callable[[Mapping[str, Any]], None],
        room: Room,
    ) -> None:
        self._job, self._board, self._tell, self._room = job, board, tell, room
        self._launch = uuid.uuid4().hex
        again = job.config.scheduler in SHOWN_AGAIN
        inner = scheduler_of(job.config, mode=board.mode, epochs=job.epochs, space=job.space, seed=job.seed)
        self._scheduler = Remembering(inner, board, feed=not again and job.config.scheduler in ("asha", "median"))
        self._stopper = _Stopper()
        shared = {
            "fixed": job.fixed.record(),
            "objective": job.objective.model_dump(mode="json"),
            "data": job.store.place,
            "cache": list(job.store.cache),
            "fingerprint": job.store.fingerprint,
            "out": str(board.out),
            "workers": share.workers,
            "threads": share.threads,
            "cpus": share.cpus,
            "gpus": job.config.gpus,
            "replay": again,
            "adopt": job.config.scheduler == "pbt",
            "launch": self._launch,
        }
        limited = None if job.config.scheduler in POPULATION else share.concurrent
        self._no_more: Callable[[], None]
        optuna: OptunaSearch | None = None
        space: dict[str, Any] = {"shared": shared}
        if job.config.search == "optuna":
            optuna = OptunaSearch(board, job.space, n_trials=job.n_trials, seed=job.seed)
            search: Any = ConcurrencyLimiter(optuna, limited) if limited else optuna
            self._no_more = optuna.stop
        else:
            waiting = list(board) if again else board.left()
            space["trial"] = tune.grid_search([as_config(trial) for trial in waiting])
            search = BasicVariantGenerator(max_concurrent=limited or 0)
            self._no_more = search.set_finished
        # not a Tuner, which is the same but writes all that it is given to a file, as a pickle
        self._ray_tune = partial(
            tune.run,
            SearchTrial,
            name="search",
            config=space,
            num_samples=job.n_trials + 1 if optuna else 1,
            resources_per_trial=share.resources(job.config.gpus),
            scheduler=self._scheduler,
            search_alg=search,
            reuse_actors=True,
            max_failures=job.config.retries,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
            storage_path=str(scratch),
            callbacks=[_Keeper(board, self._stopper, tell, job.config.retries)],
            stop=self._stopper,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            raise_on_failed_trial=False,
            verbose=0,
        )
        self.error: BaseException | None = None

    def run(self, interrupts: Interrupts) -> None:
        """Until Ray Tune has ended.

        Raises:
            ClusterError: the cluster is gone, or Ray Tune failed.
        """
        thread = threading.Thread(target=self._fit, name="ray-tune", daemon=True)
        thread.start()
        seen, looked = -1, time.monotonic()
        asked, asked_of = 0.0, frozenset[str]()
        while thread.is_alive():
            thread.join(_POLL_S)
            now = time.monotonic()
            if self._board.news != seen:
                seen, looked = self._board.news, now
                self._tell({"trials": list(self._board)})
            elif now - looked > _LOOK_S:
                looked = now
                self._room.look()
            if interrupts() and not asked:
                asked, asked_of = now, self._stopper.running
                self._scheduler.stopping = True
                self._no_more()
                Mailbox(self._launch).post(STOP, {"signal": interrupts.signal})
            if asked and (not asked_of & self._stopper.running or now - asked > _PATIENCE_S):
                self._stopper.wanted = True
        if error := self._stopper.error or self.error:
            raise error
        Mailbox(self._launch).clear()

    def _fit(self) -> None:
        try:
            self._ray_tune()
        except Exception as error:  # noqa: BLE001  (it is raised again in the thread that waits)
            lines = [line for line in str(error).splitlines() if line.strip()]
            told = ClusterError(f"Ray Tune failed ({type(error).__name__}: {lines[-1] if lines else 'no message'})")
            told.__cause__ = error
            self.error = told


class _Stopper(tune.Stopper):
    """Ends the search once nothing runs any more that could still keep where it stands."""

    def __init__(self) -> None:
        self.wanted = False
        self.running: frozenset[str] = frozenset()  # names of the trials that a process works on
        self.error: ScarcadeError | None = None  # met while a record was written

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.wanted


class _Keeper(tune.Callback):
    """Writes what happens to the trials on the board. Ray Tune calls it from its own thread."""

    def __init__(
        self, board: Board, stopper: _Stopper, tell: Callable[[Mapping[str, Any]], None], retries: int
    ) -> None:
        self._board, self._stopper, self._tell, self._retries = board, stopper, tell, retries

    def _keep(self, write: Callable[..., None], *values: Any, **named: Any) -> None:
        """Write to the board; if that fails the search ends, with the reason."""
        try:
            write(*values, **named)
        except ScarcadeError as error:
            self._stopper.error = self._stopper.error or error
            self._stopper.wanted = True

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._board[str(trial)].state == "waiting":
            self._keep(self._board.change, str(trial), state="running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        name = str(trial)
        if "past" in result:
            return
        if "interrupted" in result:
            self._keep(self._board.change, name, state="waiting")
        elif "failed" in result:
            self._keep(self._board.took, name, result, "failed")
            self._tell({"warning": f"{name} failed: {result['failed']}"})
        else:
            state: State = "done" if result["over"] else "stopped" if result["done"] else "running"
            self._keep(self._board.took, name, result, state)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = str(trial)
        result = trial.last_result or {}
        if self._board[name].state == "running" and "interrupted" not in result:  # stopped while it was paused
            self._keep(self._board.change, name, state="stopped")
        if self._board[name].state in ("done", "stopped", "failed"):
            shutil.rmtree(self._board.out / "trials" / name / "checkpoints", ignore_errors=True)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._stopper.running = frozenset(str(trial) for trial in trials if trial.status == "RUNNING")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell({"warning": f"{trial}: its process died; it goes on from its last checkpoint"})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = str(trial)
        times = self._retries + 1
        reason = f"its process died {times} times (killed, or out of memory); --tune.retries says how often it may"
        error = str(trial.get_error() or "")
        if "ray::SearchTrial" in error and "died" not in error:  # it lived on, but was not to be trusted any more
            reason = [line for line in error.splitlines() if line.strip()][-1]
        self._keep(self._board.change, name, state="failed", reason=reason)
        self._tell({"warning": f"{name} failed: {reason}"})


def _name(trial: Any) -> str:
    """What Ray calls a trial: as we do."""
    return str(json.loads(trial.config["trial"])["name"])


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder for what Ray Tune keeps, where all nodes see it; the next start sweeps it up if this one is killed."""
    folder = Path(tempfile.mkdtemp(prefix=".tmp-ray-", dir=out))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Ray Tune's switches, which are environment variables of the driver, for the time of the block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray Tune's log says in its own words what we say in ours."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray._private")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
