"""Ray Train's controller in this process, for a private session: it, and what only clusters need, start no processes.

Ray Train starts its controller as an actor, and that one starts three more: one that asks an autoscaler for nodes, one
that shares out data sets, and the barrier of its reports. Each is a Python that imports Ray, pandas and Ray Data
before the first worker begins: half of the seconds until the first step, and a tenth of a core ever after for a
controller that only asks the workers how they are. Here the thread that would wait for the controller is the
controller. What it does, restarts included, is Ray's own code; a session that was not started by us (`launch`) is left
as Ray has it.

The names below are Ray's own and not promised to stay. `test_launch.py` finds out when they go.
"""

import asyncio
import importlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any


def in_this_process(trainer: Any) -> threading.Event:
    """Let ``trainer.fit()`` run the controller in the thread that calls it, and fail when the event returned is set."""
    left = threading.Event()
    if hasattr(trainer, "_initialize_and_run_controller") and _known():
        trainer._initialize_and_run_controller = partial(_run, left)
    return left


def _known() -> bool:
    """Whether this Ray has the parts that are taken here; without them its controller is an actor."""
    try:
        group, controller = _parts()
    except (ImportError, AttributeError):
        return False
    wanted = ("_get_worker_runtime_env", "_init_train_context_on_workers")
    return all(hasattr(group, name) for name in wanted) and hasattr(controller, "_run_control_loop_iteration")


def _parts() -> tuple[Any, Any]:
    """Ray's group of workers, and its controller."""
    groups: Any = importlib.import_module("ray.train.v2._internal.execution.worker_group.worker_group")
    controllers: Any = importlib.import_module("ray.train.v2._internal.execution.controller")
    return groups.WorkerGroup, controllers.TrainController


def _run(left: threading.Event, *, scaling_policy: Any, **parts: Any) -> Any:
    """The result of a run; in the place of Ray's function of the name that is set above."""
    scaling_policy.after_controller_start = _nothing  # else an actor is started, to ask an autoscaler that is not there
    scaling_policy._maybe_send_resource_request = _nothing
    with _silent():
        controller = _controller(left)(scaling_policy=scaling_policy, **parts)
        asyncio.run(controller.run())
        return controller.get_result()


def _nothing(*_: Any) -> None:
    """In the place of what is not wanted."""


def _controller(left: threading.Event) -> Any:
    """Ray's controller, of workers that need no actor as their controller and no environment of their own."""
    group, control = _parts()
    ray = importlib.import_module("ray")

    class Group(group):  # type: ignore[misc,valid-type]
        def _get_worker_runtime_env(self, custom_runtime_env: Any) -> dict[str, Any]:
            # Ray Train would hand on its switches, which are the controller's. For a worker with an environment of its
            # own Ray starts a Python that imports Ray to set it, and then starts another.
            return {}

        def _init_train_context_on_workers(
            self, workers: Sequence[Any], sync_actor: Any, train_context_args: Mapping[str, Sequence[Any]]
        ) -> None:
            begun = [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, worker in enumerate(workers)
            ]
            ray.get(begun)

    class Controller(control):  # type: ignore[misc,valid-type]
        worker_group_cls = Group

        async def _run_control_loop_iteration(self) -> None:
            if left.is_set():
                raise RuntimeError("the driver does not wait for its workers any more")
            await super()._run_control_loop_iteration()

    return Controller


@contextmanager
def _silent() -> Iterator[None]:
    """What the controller logs is not for the user: its errors come out of it as exceptions."""
    log = logging.getLogger("ray.train")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)
