"""Ray Train's switches, the processes of it that we leave out, and the files that it leaves in a run's folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scarcade.engine.scale import Scale
from scarcade.engine.storage import Mirror, is_url

_ROOM_S = 30.0  # how long a group waits for room that was there when it was asked for


@contextmanager
def switched(scale: Scale, *, restarts: bool) -> Iterator[None]:
    """Ray Train's switches, which are environment variables of the driver, within the block.

    The health check is also how often reports are taken: at its default of two seconds each report and each
    end costs that much.

    Args:
        restarts: Ray Train itself waits for workers and restarts them; else `shifts` does.
    """
    wanted = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(
            scale.start_seconds if restarts else min(scale.start_seconds, _ROOM_S)
        ),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        # the dashboard of a named cluster tells of the run, by the name of its folder; a private session has none
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0" if restarts else "1",
        # in a private session it is in this process, whose logging is not to be changed
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0" if restarts else "1",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `shifts` looks after nodes that are to leave
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    mine = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


_UNUSED = ("PlacementGroupCleanerCallback", "DatasetsCallback")


def without_unused(trainer: Any) -> None:
    """Leave out two processes of two seconds of a core and 200 MB each, where Ray has them.

    One frees a dead controller's workers, which Ray does when the driver ends, and finds its cluster only where that
    has a dashboard; the other shares out data sets of Ray Data, of which there are none.
    """
    made = getattr(trainer, "_create_default_callbacks", None)
    if made is not None:
        trainer._create_default_callbacks = lambda: [one for one in made() if type(one).__name__ not in _UNUSED]


def remove_traces(place: str) -> None:
    """Remove what Ray Train writes in the run folder `place`.

    Its list of checkpoints would hold a later start to checkpoints that are long gone; ours are found by looking.
    """
    for name in ("checkpoint_manager_snapshot.json", ".validate_storage_marker"):
        if is_url(place):
            Mirror(place).remove_file(name)
        else:
            Path(place, name).unlink(missing_ok=True)
