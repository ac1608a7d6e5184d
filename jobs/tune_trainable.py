"""A trial of a search as Ray Tune runs it. A process runs one trial after the other: a new one costs seven seconds.
It is the first of the trial's workers where there are several (`tune_gang`), and these stay with it.

What goes wrong within a trial is its result, so it fails alone and is not tried again: it would fail again. Only where
the process itself dies does Ray start the trial anew, and it continues from its own checkpoint.
"""

import json
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

from ray import tune

from scarcade.engine.errors import ScarcadeError
from scarcade.engine.mailbox import Mailbox
from scarcade.engine.memory import ran_out
from scarcade.engine.world import use_threads
from scarcade.jobs.tune_board import is_over, read_record
from scarcade.jobs.tune_gang import Gang, GangTraining, Lost
from scarcade.jobs.tune_training import Result, TrialTraining, adopt

STOP = "stop"  # the message by which the driver asks all trials to stop
_ASK_EVERY_S = 0.5
_ABOUT, _CHECKPOINT = "about.json", "checkpoint"


class SearchTrial(tune.Trainable):
    """One trial: a step is an epoch.

    Its configuration is ``{"shared": what all trials have in common, "trial": JSON}``; its name is Ray's, which it
    keeps when it takes over another's parameters.
    """

    def setup(self, config: dict[str, Any]) -> None:
        shared = config["shared"]
        use_threads(shared["threads"])
        self._gang = Gang(shared) if shared["workers"] > 1 else None
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._leave()
        self._take(new_config)
        return True

    def cleanup(self) -> None:
        self._leave()
        if self._gang is not None:
            self._gang.end()

    def _take(self, config: dict[str, Any]) -> None:
        self._shared, self._parameters = config["shared"], json.loads(config["trial"])["parameters"]
        self._training: TrialTraining | GangTraining | None = None
        self._stop = _Asked(self._shared["launch"])
        self._past: deque[Result] | None = None  # results of an earlier start that are told again; None: not yet read

    def _leave(self) -> None:
        if self._training is not None:
            self._training.close()
        self._training = None

    def step(self) -> Result:
        began = time.perf_counter()
        try:
            return self._past_result() or self._trained()
        except Lost:
            raise  # as if this process had died
        except ScarcadeError as error:
            reason = str(error)
        except Exception as error:
            if self._shared["gpus"] and not ran_out(error):
                raise  # a GPU may be of no use any more to this process
            reason = "out of memory" if ran_out(error) else f"{type(error).__name__}: {error}"
        self._leave()
        return {"failed": reason, "parameters": self._parameters, "seconds": time.perf_counter() - began, "done": True}

    def _past_result(self) -> Result | None:
        """The next result of an earlier start, for a scheduler that must see everything again (hyperband)."""
        if not self._shared["replay"]:
            return None
        if self._past is None:
            self._past = self._read_past()
        return self._past.popleft() if self._past else None

    def _read_past(self) -> deque[Result]:
        record = read_record(Path(self._shared["out"]), self.trial_name)
        about = {"parameters": record.parameters, "metrics": record.metrics, "seconds": 0.0, "past": True}
        past: deque[Result] = deque({"epoch": epoch, "objective": value, **about} for epoch, value in record.curve)
        if past and is_over(record):
            past[-1] |= {"done": record.state == "done", "over": record.state == "done"}
        if record.state == "failed":
            past.append({"failed": record.reason, "done": True, **about})
        return past

    def _trained(self) -> Result:
        if self._training is None and not self._stop():
            arguments = (self._shared, self.trial_name, self._parameters, self._stop)
            self._training = TrialTraining(*arguments) if self._gang is None else self._gang.begin(*arguments)
        result = None if self._training is None or self._stop() else self._training.epoch()
        if result is None:
            if self._training is not None:
                self._training.saved()
            return {"interrupted": True}
        return {**result, "done": result["over"]}

    def save_checkpoint(self, checkpoint_dir: str) -> Any:
        """For a trial that is paused, or that others continue from: pbt alone needs the bytes."""
        about: dict[str, Any] = {"trial": self.trial_name}
        if self._training is not None:
            saved = self._training.saved()
            if self._shared["adopt"]:
                about["checkpoint"] = saved.name
                shutil.copytree(saved, Path(checkpoint_dir) / _CHECKPOINT / saved.name)
        elif self._past is not None:
            about["past"] = len(self._past)
        (Path(checkpoint_dir) / _ABOUT).write_text(json.dumps(about))
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: Any) -> None:
        about = json.loads((Path(checkpoint) / _ABOUT).read_text())
        if "past" in about:
            past = self._read_past()
            self._past = deque(list(past)[len(past) - about["past"] :])
        elif self._past is None:
            self._past = deque()
        if about["trial"] != self.trial_name and "checkpoint" in about:
            self._leave()
            source = Path(checkpoint) / _CHECKPOINT / about["checkpoint"]
            adopt(source, Path(self._shared["out"]), self.trial_name)


class _Asked:
    """Whether the driver has asked all trials to stop; asked in every step, found out twice a second."""

    def __init__(self, launch: str) -> None:
        self._mailbox, self._last, self._found = Mailbox(launch), 0.0, False

    def __call__(self) -> bool:
        if not self._found and time.monotonic() - self._last > _ASK_EVERY_S:
            self._last = time.monotonic()
            self._found = self._mailbox.look(STOP) is not None
        return self._found
