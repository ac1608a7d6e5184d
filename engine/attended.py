"""Attends one group of workers from its start to its end: passes messages on, and asks it to stop when it is time."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from scarcade.engine.cluster import HEAD_AWAY_S, check_alive
from scarcade.engine.interrupts import Interrupts
from scarcade.engine.mailbox import Mailbox

_POLL_S = 0.2
_LOOK_S = 1.0  # how often the cluster is looked at
_LEAVE_S = 2.0  # how long `fit` may take to end when it is left
STOPPED = "interrupted"  # what `stopped` says in the result of a work that ended because it was asked to


class Attended:
    """`TorchTrainer.fit` in a thread, while the thread that asked passes messages and signals on.

    (From the main thread Ray would take SIGINT for itself.)

    Args:
        launch: the name of the mailbox that this group of workers has.
        size: how many workers it has.
        leave: called when nobody waits for them any more, to end `fit`.
    """

    def __init__(self, fit: Callable[[], Any], launch: str, size: int, leave: Callable[[], None] | None = None) -> None:
        self._fit_workers, self.size, self._leave = fit, size, leave
        self._mailbox = Mailbox(launch)
        self._fitted: Any = None
        self.error: Exception | None = None
        self.regrouped = False  # it was asked to stop so that another group takes over, and did
        self.step: int | None = None  # of the newest checkpoint that this group committed
        self._places: dict[int, str] = {}

    def _fit(self) -> None:
        try:
            self._fitted = self._fit_workers()
        except Exception as error:  # noqa: BLE001  (it is raised again in the thread that waits)
            self.error = error

    def result(
        self,
        tell: Callable[[Mapping[str, Any]], None],
        interrupts: Interrupts,
        regroup: Callable[["Attended"], bool] | None = None,
    ) -> dict[str, Any]:
        """What rank 0 returned; empty if `error` is set.

        Args:
            regroup: asked every second whether the workers should stop and leave the rest to another group.
        """
        thread = threading.Thread(target=self._fit, daemon=True)
        thread.start()
        try:
            return self._attended(thread, tell, interrupts, regroup)
        except BaseException:
            if self._leave is not None:
                self._leave()
                thread.join(_LEAVE_S)
            raise

    def _attended(
        self,
        thread: threading.Thread,
        tell: Callable[[Mapping[str, Any]], None],
        interrupts: Interrupts,
        regroup: Callable[["Attended"], bool] | None,
    ) -> dict[str, Any]:
        asked = False
        looked = time.monotonic()
        while thread.is_alive():
            thread.join(_POLL_S)
            if regroup is not None:
                check_alive(patience_s=HEAD_AWAY_S)  # else what is asked of it would hang
            self._hear(tell)
            if interrupts() and not asked:
                asked = True
                self._mailbox.post("stop", {"signal": interrupts.signal})
            if regroup is not None and not asked and time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                if regroup(self):
                    asked = self.regrouped = True
                    self._mailbox.post("stop", {"regroup": True})
        if regroup is not None:
            check_alive(patience_s=HEAD_AWAY_S)
        self._hear(tell)
        self._mailbox.clear()
        returned = {} if self.error is not None else dict(self._fitted.return_value)
        self.regrouped &= returned.get("result", {}).get("stopped") == STOPPED and not interrupts()
        return returned

    def _hear(self, tell: Callable[[Mapping[str, Any]], None]) -> None:
        for message in self._mailbox.received():
            tell(message)
        if (found := self._mailbox.look("checkpoint")) is not None:
            self.step = int(found["step"])
        for rank in range(self.size):
            if rank not in self._places and (found := self._mailbox.look(f"worker-{rank}")) is not None:
                self._places[rank] = str(found["node"])

    @property
    def has_begun(self) -> bool:
        """Whether all of its workers have told where they are."""
        return len(self._places) == self.size

    @property
    def nodes(self) -> set[str]:
        """Ids of the nodes that its workers are on, as far as they have told."""
        return set(self._places.values())
