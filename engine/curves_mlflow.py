"""Sends the metrics of a run to MLflow: one run there for one run here, joined again when it is continued.

Which run it is, is kept in ``OUT/mlflow.json``; which lines it has, MLflow itself is asked, so that lines that were
sent just before a kill are not sent twice. Without a tracking URI it is a file of the run, ``OUT/mlflow.db``, and
nothing goes over a network; MLflow's own usage reports are switched off.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from scarcade.engine.curves import About, LogConfig, numbers
from scarcade.engine.joined_run import JoinedRun
from scarcade.engine.metrics import Line

_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_PARAMS = 100  # as many as MLflow takes at once
_LENGTH = 500  # of a value, as older servers take it


class Mlflow:
    """One run in MLflow."""

    def __init__(self, config: LogConfig, about: About, joined: JoinedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # which tell of every table that they make
            logging.getLogger(name).setLevel(logging.WARNING)
        self._metric = Metric
        self._client: Any = MlflowClient(tracking_uri=config.mlflow_place or _database(about.folder / "mlflow.db"))
        run = None
        if joined.ident is not None:
            try:
                run = self._client.get_run(joined.ident)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if run is None:  # or another server was given, or the run was deleted there: all lines are sent
            run = self._client.create_run(self._experiment(config.project), run_name=about.name)
            joined.keep(run.info.run_id)
            params = [Param(name, str(value)[:_LENGTH]) for name, value in about.settings.items()]
            for first in range(0, len(params), _PARAMS):
                self._client.log_batch(run.info.run_id, params=params[first : first + _PARAMS])
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._run = run.info.run_id
        self.after = self._newest("cells")

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def _newest(self, metric: str) -> int:
        """The step of the last line that is there; every line has `metric`."""
        return max((int(one.step) for one in self._client.get_metric_history(self._run, metric)), default=-1)

    def write(self, line: Line) -> None:
        """Take the numbers of one line, all or none."""
        when = int(line.get("time", time.time()) * 1000)
        metrics = [self._metric(name, value, when, line["step"]) for name, value in numbers(line).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def flush(self) -> None:
        """Every line was sent when it was written."""

    def close(self, ended: str) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._run, _STATUS[ended])


def _database(path: Path) -> str:
    """URI of the file, which is made if it is not there: whole or not at all, for half of its tables is for ever."""
    from mlflow.tracking import MlflowClient

    if not path.exists():
        making = path.with_name(f".tmp-{path.name}")
        making.unlink(missing_ok=True)
        MlflowClient(tracking_uri=f"sqlite:///{making}")
        making.replace(path)
    return f"sqlite:///{path}"
