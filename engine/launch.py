"""Runs a piece of training in this process, or on many workers of Ray Train.

With no workers asked for it is a plain call and Ray is not even imported. With one or more, a trainer of Ray Train
starts them (`worker_entry`, `in_worker`); what they do is the same function. In a private session it also restarts them
when one dies; on a cluster, whose nodes come and go, `shifts` begins another group. An error of ours that a worker
meets is raised in the driver as what it is, and not retried: a broken file does not mend.
"""

import importlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scarcade.engine.attended import Attended
from scarcade.engine.cluster import cluster, is_private
from scarcade.engine.cores import cores, offered
from scarcade.engine.errors import UsageError
from scarcade.engine.failures import explained, revived
from scarcade.engine.interrupts import Interrupts
from scarcade.engine.nodes import elsewhere
from scarcade.engine.scale import Scale
from scarcade.engine.shared_folder import marked
from scarcade.engine.shifts import Shifts
from scarcade.engine.storage import is_url
from scarcade.engine.train_here import in_this_process
from scarcade.engine.train_switches import remove_traces, switched, without_unused
from scarcade.engine.worker_entry import enter
from scarcade.engine.world import World, use_threads

__all__ = ["Message", "Scale", "Work", "Worker", "run"]

Message = Mapping[str, Any]
_COLLECTIVE_S = 600  # how long workers wait for one that answers Ray and does nothing


@dataclass(frozen=True)
class Worker:
    """What a piece of training knows of the process that it runs in."""

    world: World
    tell: Callable[[Message], None]  # a message for the user, from rank 0
    stop: Callable[[], bool]  # whether to stop between two steps
    announce: Callable[[Path | None, int], None] | None = None  # a committed checkpoint, on every rank


Work = Callable[[Worker, Mapping[str, Any]], dict[str, Any]]


def run(
    work: Work,
    arguments: Mapping[str, Any],
    scale: Scale,
    place: str,
    *,
    tell: Callable[[Message], None],
    interrupts: Interrupts,
) -> dict[str, Any]:
    """``work(worker, arguments)`` on every worker; what rank 0 returns.

    Args:
        work: a function at the top of a module, so that it can be named to the workers.
        arguments: anything JSON can hold.
        place: the run folder, or its URL, below which `work` commits ``checkpoints/``.
        tell: is given, in this process, what rank 0 tells.

    Raises:
        ClusterError: the workers could not be had, or died more often than `scale.max_failures`.
        ScarcadeError: what `work` raised, as the same class.
    """
    if scale.workers == 0:
        with _threads(scale.threads):
            return work(Worker(World(device=_own_device(scale)), tell, interrupts), arguments)
    private = scale.address is None and not os.environ.get("RAY_ADDRESS")
    cpus, threads = scale.grant(private=private)
    launch = uuid.uuid4().hex
    if private and scale.min_workers is not None:
        tell({"note": "--scale.min-workers is for clusters, whose nodes can be lost: without one it changes nothing"})

    def begin(size: int, avoid: frozenset[str] = frozenset()) -> Attended:
        remove_traces(place)
        grant = Grant(cpus, threads, place, launch, uuid.uuid4().hex, size, scale.gpus)
        trainer = _trainer(work, arguments, scale, grant, avoid=avoid, restarts=private)
        without_unused(trainer)
        return Attended(trainer.fit, grant.group, size, in_this_process(trainer).set if is_private() else None)

    with (
        switched(scale, restarts=private),
        cluster(scale.address, cpus=offered(scale.workers, cpus)),
        marked(place, launch),
    ):
        try:
            if private:
                attended = begin(scale.workers)
                returned = attended.result(tell, interrupts)
                if attended.error is not None:
                    raise explained(attended.error, scale, cpus) from attended.error
            else:
                returned = Shifts(scale, _resources(scale, cpus), begin, tell, interrupts).result()
        finally:
            remove_traces(place)
    if "error" in returned:
        raise revived(returned["error"])
    return dict(returned["result"])


def _own_device(scale: Scale) -> torch.device:
    if not scale.gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--scale.gpus: torch finds no GPU here")
    return torch.device("cuda", 0)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """This process computes with `n` threads within the block (default: one for each core that it may use)."""
    before = torch.get_num_threads()
    use_threads(n or cores())
    try:
        yield
    finally:
        use_threads(before)


def _resources(scale: Scale, cpus: float) -> dict[str, float]:
    """What one worker is given, as Ray calls it."""
    return {"CPU": cpus} | ({"GPU": 1.0} if scale.gpus else {})


@dataclass(frozen=True)
class Grant:
    """What one group of workers asks of Ray."""

    cpus: float
    threads: int
    place: str
    launch: str
    group: str  # the name of its mailbox
    size: int
    gpus: bool


def _backend(trainers: Any, scale: Scale) -> Any:
    """What makes a process group of the workers.

    On GPUs that is Ray's own, which also gives each worker its device. It imports torch and Tune in every process that
    hears of it; on CPUs the workers meet by themselves (`in_worker`), a second earlier.
    """
    if not scale.gpus:
        return trainers.BackendConfig()
    torch_train: Any = importlib.import_module("ray.train.torch")
    return torch_train.TorchConfig(backend="nccl", timeout_s=_COLLECTIVE_S)


def _trainer(
    work: Work, arguments: Mapping[str, Any], scale: Scale, grant: Grant, *, avoid: frozenset[str], restarts: bool
) -> Any:
    """Ray's trainer for `work`, on none of the nodes to `avoid`; it `restarts` workers that die, or ends."""
    train: Any = importlib.import_module("ray.train")
    trainers: Any = importlib.import_module("ray.train.v2.api.data_parallel_trainer")
    above, name = _above(grant.place)
    return trainers.DataParallelTrainer(
        enter,
        train_loop_config={
            "work": f"{work.__module__}:{work.__qualname__}",
            "arguments": dict(arguments),
            "grant": asdict(grant),
        },
        backend_config=_backend(trainers, scale),
        scaling_config=train.ScalingConfig(
            num_workers=grant.size,
            use_gpu=scale.gpus,
            resources_per_worker=_resources(scale, grant.cpus),
            label_selector=elsewhere(avoid),
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=above,
            failure_config=train.FailureConfig(
                max_failures=scale.max_failures if restarts else 0,
                controller_failure_limit=1 if restarts else 0,
                max_preemption_failures=-1 if restarts else 0,
            ),
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _above(place: str) -> tuple[str, str]:
    """(what holds the run folder, its name); the query of a URL stays with the former."""
    path, mark, query = place.partition("?") if is_url(place) else (place, "", "")
    above, _, name = path.rstrip("/").rpartition("/")
    return (above or "/") + mark + query, name
