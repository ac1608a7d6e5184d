"""The curves of one training: which targets follow its metrics, what they are told of it, and how it ended."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from scarcade.engine.curves import TITLES, About, Curves, LogConfig, Sink, Target, check_installed
from scarcade.engine.errors import UsageError
from scarcade.engine.joined_run import JoinedRun
from scarcade.jobs.run_folder import RunFolder, flat
from scarcade.jobs.train_config import TrainConfig

Tell = Callable[[Mapping[str, Any]], None]


@dataclass
class RunCurves:
    """What a training tells goes to the user, and moves the curves."""

    tell: Tell
    ended: str = "failed"  # until it is known better
    curves: list[Curves] = field(default_factory=list)

    def progress(self, line: Mapping[str, Any]) -> None:
        """As `fit` wants it."""
        self.tell(line)
        for one in self.curves:
            one.moved()


@contextmanager
def run_curves(config: TrainConfig, folder: RunFolder, tell: Tell, *, first: bool = True) -> Iterator[RunCurves]:
    """Curves of the run in `folder`, on the `first` worker; those that follow them are up to date after the block."""
    found = RunCurves(tell)
    name = config.log.name or folder.place.partition("?")[0].rstrip("/").rpartition("/")[2]
    settings = flat(config.model_dump(mode="json", exclude={"log"}))
    about = About(name, folder.local, settings)
    for target in config.log.to if first else ():
        opened = partial(_opened, target, config.log, about)
        found.curves.append(
            Curves(TITLES[target], folder.metrics, opened, lambda sentence: tell({"warning": sentence}))
        )
    try:
        yield found
    finally:
        for one in found.curves:
            one.close(found.ended)


def _opened(target: Target, config: LogConfig, about: About) -> Sink:
    """Join a target; its library is imported only now."""
    if target == "tensorboard":
        from scarcade.engine.curves_tensorboard import TensorBoard

        return TensorBoard(about)
    joined = JoinedRun(about.folder, target)
    if target == "mlflow":
        from scarcade.engine.curves_mlflow import Mlflow

        return Mlflow(config, about, joined)
    from scarcade.engine.curves_wandb import Wandb

    return Wandb(config, about, joined)


def check_targets(config: LogConfig, folder: RunFolder) -> None:
    """Before anything starts: the targets can be reached from a run in `folder`.

    Raises:
        UsageError: a library is missing, or files of a target would lie in the scratch folder of a run at a URL.
    """
    check_installed(config)
    if folder.mirror is None:
        return
    if "mlflow" in config.to and not config.mlflow_place:
        raise UsageError(
            f"--log mlflow: {folder.place} is a URL, and MLflow keeps a file only on a disk; name its server by "
            "--log.mlflow URI or MLFLOW_TRACKING_URI"
        )
    if "wandb" in config.to and config.wandb == "offline":
        raise UsageError(
            f"--log wandb: {folder.place} is a URL, and Weights & Biases keeps files for later only on a disk; send "
            "them at once by --log.wandb online"
        )
