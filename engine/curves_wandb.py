"""Sends the metrics of a run to Weights & Biases: one run there for one run here, joined again when it is continued.

Offline unless ``--log.wandb online`` is given: then nothing goes over a network, and ``wandb sync OUT/wandb/offline-*``
sends it later. Code, git and the machine's load are not recorded, and errors of wandb are not reported to its makers.
"""

import os
import uuid
from typing import Any

from scarcade.engine.curves import About, LogConfig, numbers
from scarcade.engine.joined_run import JoinedRun
from scarcade.engine.metrics import Line


class Wandb:
    """One run in Weights & Biases."""

    def __init__(self, config: LogConfig, about: About, joined: JoinedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._ident = joined.ident or uuid.uuid4().hex[:12]
        self._joined = joined
        self.after = self._written = joined.step  # offline nobody can be asked which lines are there
        joined.keep(self._ident, joined.step)
        self._run: Any = wandb.init(
            project=config.project,
            name=about.name,
            id=self._ident,
            resume="allow",
            dir=str(about.folder),
            mode=config.wandb,
            config={name: value for name, value in about.settings.items() if value is not None},
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )

    def write(self, line: Line) -> None:
        """Take the numbers of one line."""
        self._run.log(numbers(line), step=line["step"])
        self._written = line["step"]

    def flush(self) -> None:
        """Remember what is there."""
        self._joined.keep(self._ident, self._written)

    def close(self, ended: str) -> None:
        """Say how the run ended, and wait until all is written."""
        self._run.finish(exit_code=0 if ended == "finished" else 1)
