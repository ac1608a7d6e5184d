"""The workers of a trial where it has several: the trial's own process is the first, and makes the others.

Ray Tune reserves a placement group for a trial, a bundle for each worker: it has room for all of them or does not
begin, so no two trials wait for each other with half of their workers there. (Ray Train within a trial would reserve
its workers after the trial itself.) A gang trains one trial after the other, as processes cost seconds and a process
group next to nothing: the latter is made anew after whatever went wrong.

An error of one worker is the trial's: it leaves the group, which makes the others fail too, and the first of them finds
out whose reason it was. Where a process died the trial is begun anew, by Ray Tune, and continues from its checkpoint.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from scarcade.engine.errors import MemoryLimitError, ScarcadeError
from scarcade.engine.failures import revived
from scarcade.engine.memory import ran_out
from scarcade.engine.world import World, meeting_place, met, use_threads
from scarcade.jobs.tune_training import Result, TrialTraining, device_of

_START_S = 300.0  # how long a process may take to start
_COLLECTIVE_S = 600.0  # how long the others may take longer than this process does
_LAST_S = 60.0  # how long they may, once it has failed
_LOOK_S = 1.0
_STUCK_S = 10.0  # how long this process may stay in a collective with one that is gone

T = TypeVar("T")
Shared = Mapping[str, Any]
Answer = dict[str, str] | None
"""Of a worker: None, or the class and the message of its error; no class: it may be that of another one."""


class Lost(Exception):
    """The workers of a trial are not together any more: it is to be begun anew, with others."""


class Gang:
    """The workers of a trial, as the first of them has them; to be made within the trial's actor."""

    def __init__(self, shared: Shared) -> None:
        self._shared, self._size = shared, int(shared["workers"])
        self._members: list[Any] = []
        self._world: World | None = None
        self._hire()  # so that they start while this process does

    def begin(
        self, shared: Shared, name: str, parameters: Mapping[str, Any], stop: Callable[[], bool]
    ) -> "GangTraining":
        """Begin the trial `name` on all workers: arguments as `TrialTraining` has them."""
        world = self._together_still() or self._meet()
        own = self.together(
            "begin", shared, name, parameters, own=lambda: TrialTraining(shared, name, parameters, stop, world)
        )
        return GangTraining(self, own)

    def together(self, order: str, *given: Any, own: Callable[[], T]) -> T:
        """What `own` returns, while the other workers follow `order`.

        Raises:
            Lost: a worker died, or they lost each other. ScarcadeError: what one of them met.
        """
        answers = [getattr(member, order).remote(*given) for member in self._members]
        try:
            with _watched(answers):
                result = own()
        except Exception as error:  # noqa: BLE001  (it is raised again, or what caused it)
            self._failed(error, answers)
        try:
            said = [answer for answer in self._told(answers, _COLLECTIVE_S) if answer]
        except Lost:
            self._part()
            raise
        if said:
            self._part()
            raise _reason_in(said) or Lost(f"the workers of this trial lost each other ({said[0]['message']})")
        return result

    def tell(self, order: str) -> None:
        """Give the other workers an `order` that none of them can fail at."""
        for member in self._members:
            getattr(member, order).remote()

    def end(self) -> None:
        """Let the processes go. More trials get others."""
        self._part()
        for member in self._members:
            ray.kill(member)
        self._members = []

    def _together_still(self) -> World | None:
        """The process group of the trial before, if nobody has gone since; else the next one gets new processes."""
        if self._world is not None:
            try:
                ray.get([member.process.remote() for member in self._members], timeout=_LAST_S)
            except (RayActorError, GetTimeoutError):
                self.end()
        return self._world

    def _hire(self) -> None:
        group = ray.util.get_current_placement_group()
        assert group is not None
        kind: Any = ray.remote(Member)
        for rank in range(1, self._size):
            place = PlacementGroupSchedulingStrategy(group, rank, placement_group_capture_child_tasks=True)
            grant = {"num_cpus": self._shared["cpus"], "num_gpus": self._shared["gpus"], "scheduling_strategy": place}
            self._members.append(kind.options(**grant).remote(rank, self._shared))

    def _meet(self) -> World:
        """Make the process group, of new processes where there are none."""
        if not self._members:
            self._hire()
        try:
            ray.get([member.process.remote() for member in self._members], timeout=_START_S)
        except (RayActorError, GetTimeoutError) as error:
            raise Lost(f"a worker of this trial did not start ({type(error).__name__})") from error
        util: Any = ray.util
        host = util.get_node_ip_address()
        place = meeting_place(host, self._size)
        device = device_of(self._shared)
        self._world = self.together("meet", host, place.port, own=lambda: met(0, self._size, place, device))
        return self._world

    def _part(self) -> None:
        """Leave the group: others that are in it still fail, and the next trial gets a new one."""
        if self._world is not None:
            self._world.leave()
        self._world = None

    def _failed(self, error: Exception, answers: Sequence[Any]) -> NoReturn:
        """Raise the reason, after this worker met `error`."""
        self._part()
        unclear = not _answer(error)["class"]
        try:
            said = [answer for answer in self._told(answers, _LAST_S) if answer]
        except Lost:
            if unclear:
                raise
            self.end()
            raise error from None
        if not unclear:
            raise error
        raise _reason_in(said) or Lost(f"the workers of this trial lost each other ({error})") from error

    @staticmethod
    def _told(answers: Sequence[Any], patience_s: float) -> list[Answer]:
        """What the other workers answered.

        Raises:
            Lost: one of them is dead, or does not answer.
        """
        try:
            return list(ray.get(list(answers), timeout=patience_s))
        except RayActorError as error:
            raise Lost("a worker of this trial died") from error
        except GetTimeoutError as error:
            raise Lost("a worker of this trial hangs") from error


class GangTraining:
    """A trial that is being trained by a gang: as `TrialTraining`."""

    def __init__(self, gang: Gang, own: TrialTraining) -> None:
        self._gang, self._own = gang, own

    def epoch(self) -> Result | None:
        """Train one epoch; None: it was asked to stop."""
        return self._gang.together("epoch", own=self._own.epoch)

    def saved(self) -> Path:
        """Commit a checkpoint of where it stands; its folder."""
        return self._gang.together("save", own=self._own.saved)

    def close(self) -> None:
        """Let go of the model, on all workers."""
        self._own.close()
        self._gang.tell("close")


class Member:
    """A worker of a trial that is not the first, in a process of its own. It answers, and raises nothing."""

    def __init__(self, rank: int, shared: Shared) -> None:
        self._rank, self._size, self._device = rank, int(shared["workers"]), device_of(shared)
        use_threads(shared["threads"])
        self._world = World()
        self._training: TrialTraining | None = None

    def process(self) -> int:
        """Its id; whoever has it knows that the worker is there."""
        return os.getpid()

    def meet(self, host: str, port: int) -> Answer:
        """Join the process group."""

        def join() -> None:
            self._world = met(self._rank, self._size, (host, port), self._device)

        return self._answered(join)

    def begin(self, shared: Shared, name: str, parameters: Mapping[str, Any]) -> Answer:
        """Begin a trial."""

        def begin() -> None:
            self.close()
            self._training = TrialTraining(shared, name, parameters, lambda: False, self._world)

        return self._answered(begin)

    def epoch(self) -> Answer:
        """Train one epoch."""
        assert self._training is not None
        return self._answered(self._training.epoch)

    def save(self) -> Answer:
        """Take part in a checkpoint."""
        assert self._training is not None
        return self._answered(self._training.save)

    def close(self) -> None:
        """Let go of the model."""
        if self._training is not None:
            self._training.close()
        self._training = None

    def _answered(self, do: Callable[[], Any]) -> Answer:
        try:
            do()
        except Exception as error:  # noqa: BLE001  (it is the answer)
            self._world.leave()
            self._world = World()
            return _answer(error)
        return None


def _answer(error: Exception) -> dict[str, str]:
    """An error as a worker answers it."""
    if ran_out(error):
        return {"class": MemoryLimitError.__name__, "message": "out of memory"}
    if isinstance(error, ScarcadeError):
        return {"class": type(error).__name__, "message": str(error)}
    # torch says by a RuntimeError, too, that another worker went away
    known = "" if isinstance(error, RuntimeError) else ScarcadeError.__name__
    return {"class": known, "message": f"{type(error).__name__}: {error}"}


def _reason_in(said: Sequence[Mapping[str, str]]) -> ScarcadeError | None:
    """The first error among the answers that is a worker's own."""
    return next((revived(answer) for answer in said if answer["class"]), None)


@contextmanager
def _watched(answers: Sequence[Any]) -> Iterator[None]:
    """End this process if it hangs in the block with a worker that is gone, as it does with a lost node, or nccl.

    Ray Tune then begins the trial anew. (With gloo on one machine the collective fails at once.)
    """
    left = threading.Event()

    def look() -> None:
        while not left.wait(_LOOK_S):
            if any(_died(answer) for answer in answers) and not left.wait(_STUCK_S):
                os._exit(1)

    threading.Thread(target=look, name="gang", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _died(answer: Any) -> bool:
    """Whether the worker that is to give this answer is dead."""
    try:
        ray.get(answer, timeout=0)
    except RayActorError:
        return True
    except RayError:  # that there is none yet
        return False
    return False
