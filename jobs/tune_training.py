"""The training of one trial of a search, an epoch at a time: what `train` does, with a decision after each epoch.

It streams the store as every training does and keeps checkpoints of its own, so a trial whose process dies continues
where it stood, whoever runs it next. On several workers each of them has one of these, and all are told the same
(`tune_gang`); the first alone writes and decides. Nothing here knows Ray.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.config import checked
from scarcade.engine.errors import CheckpointError, ClusterError, DataChangedError
from scarcade.engine.folder import problems
from scarcade.engine.launch import Worker
from scarcade.engine.loop import Run
from scarcade.engine.world import World
from scarcade.jobs.run_folder import RunFolder
from scarcade.jobs.train_work import checkpoints_in, prepared, update_in
from scarcade.jobs.tune_board import RECORD, trial_folder
from scarcade.jobs.tune_config import Objective
from scarcade.jobs.tune_scores import validation_scores
from scarcade.jobs.tune_space import Fixed

Result = dict[str, Any]


class TrialTraining:
    """A trial that is being trained.

    Args:
        shared: what all trials have in common (`tune_run.Job.shared`).
        name, parameters: of the trial.
        stop: asked in each step; once it says True a checkpoint is committed and the epoch is left.
        world: this worker among those of the trial; None: it is the only one.
    """

    def __init__(
        self,
        shared: Mapping[str, Any],
        name: str,
        parameters: Mapping[str, Any],
        stop: Callable[[], bool],
        world: World | None = None,
    ) -> None:
        began = time.perf_counter()
        self.parameters = dict(parameters)
        self._objective = checked(Objective, shared["objective"])
        self._store = _opened(shared["data"], shared["fingerprint"], tuple(shared["cache"]))
        self._config = Fixed(**shared["fixed"]).config(parameters, self._store)
        folder = trial_folder(Path(shared["out"]), name)
        if not (folder / RECORD).is_file():
            raise ClusterError(
                f"--out {shared['out']}: the worker on {os.uname().nodename} does not see the folder that this command "
                "writes to; on a cluster it must lie on storage that all nodes share"
            )
        self._folder = RunFolder(folder)
        self._world = world or World(device=device_of(shared))
        worker = Worker(self._world, tell=lambda message: None, stop=stop)
        change = update_in(self._config, self._store)
        model, loaders = prepared(worker, self._config, self._store, change)
        self._model = model
        placed = model.to(self._world.device)
        self._run = Run(placed, loaders[0], loaders[1], self._config.optim, world=self._world, seed=self._config.seed)
        self._checkpoints = checkpoints_in(worker, self._folder, self._config, self._store, change)
        self._run.checkpoints, self._run.metrics, self._run.stop = self._checkpoints, self._folder.metrics, stop
        self._run.begin()
        self._began: float | None = began  # opening counts as training, of the first epoch

    def epoch(self) -> Result | None:
        """Train one epoch; on the first worker its metrics and objective. None there: it was asked to stop.

        Raises:
            NonFiniteError: the loss, the validation or the objective is not finite.
        """
        began, self._began = self._began or time.perf_counter(), None
        run = self._run
        if not run.is_over():  # else it was, when its process died
            if not run.epoch():
                return None
            due = run.is_over() or self._checkpoints.due(run.state.step)
            if self._world.say({"save": due})["save"]:  # it may be due by the clock, of which each worker has its own
                run.save()
        if not self._world.first:
            return None
        line = run.state.history[-1]
        found = {name.removeprefix("validation/"): value for name, value in line.items() if "validation/" in name}
        if self._objective.scores:
            names, seed = self._objective.scores, self._config.seed
            found |= validation_scores(self._model, self._store, self._config, names, seed)
        return {
            "epoch": run.state.epoch,
            "objective": self._objective.value(found),
            "metrics": found,
            "parameters": self.parameters,
            "over": run.is_over(),
            "seconds": time.perf_counter() - began,
        }

    def save(self) -> None:
        """Commit a checkpoint of where it stands."""
        self._run.save()

    def saved(self) -> Path:
        """Commit a checkpoint of where it stands; its folder. On the first worker, while the others `save`."""
        self.save()
        return max(self._folder.checkpoints.glob("step-*"))

    def close(self) -> None:
        """Let go of the model and of the folder."""
        self._run.close()
        self._folder.close()


def device_of(shared: Mapping[str, Any]) -> torch.device:
    """Where a worker computes: on the first GPU of those that Ray gave it, if trials have any."""
    return torch.device("cuda", 0) if shared["gpus"] else torch.device("cpu")


def adopt(checkpoint: Path, out: Path, name: str) -> None:
    """From now on the trial `name` continues from `checkpoint`, another trial's.

    Raises:
        CheckpointError: it is not intact.
    """
    if wrong := problems(checkpoint):
        raise CheckpointError(f"{checkpoint}: {wrong[0]}")
    own = trial_folder(out, name) / "checkpoints"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(checkpoint, own / checkpoint.name)


@lru_cache(maxsize=1)
def _opened(path: str, fingerprint: str, cache: tuple[str | None, float | None]) -> Store:
    """The store, opened once for all trials of a process."""
    store = open_store(path, cache=cache)
    if store.fingerprint != fingerprint:
        raise DataChangedError(f"{store.where}: is not the same store on every machine of the cluster")
    return store
