"""Writes the curves of a run for TensorBoard, to ``OUT/tensorboard``.

The event file is written anew by each start, from the metrics that the run kept: appending to the one of a run that was
killed would leave a gap where its last lines were not on the disk yet, or show steps twice that were taken twice.
tensorboardX comes with ray[tune]; its writer with a thread is not used, as an error in there would be lost.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scarcade.engine.curves import About, numbers
from scarcade.engine.metrics import Line

FOLDER = "tensorboard"


class TensorBoard:
    """The event file of this start."""

    after = -1

    def __init__(self, about: About) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar, text

        self._event, self._scalar = event_pb2.Event, scalar
        folder: Path = about.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer: Any = EventsWriter(str(folder / "events"))
        now = time.time()
        # one that watches already drops what it read of the older file
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(wall_time=now, step=0, session_log=start))
        settings = text("settings", _table(about.settings))
        self._writer.write_event(self._event(wall_time=now, step=0, summary=settings))

    def write(self, line: Line) -> None:
        """Take the numbers of one line."""
        for name, value in numbers(line).items():
            summary = self._scalar(name, value)
            self._writer.write_event(self._event(wall_time=line["time"], step=line["step"], summary=summary))

    def flush(self) -> None:
        """What was written shall be seen now."""
        self._writer.flush()

    def close(self, ended: str) -> None:
        """Nothing follows."""
        self._writer.close()


def _table(settings: Mapping[str, Any]) -> str:
    """As markdown, which is what TensorBoard shows as text."""
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])
