"""Runs a piece of training in this process, or on many workers of Ray Train: the only ray.train import.

With no workers asked for it is a plain call and Ray is not even imported. With one or more, a TorchTrainer
starts them; what they do is the same function. In a private session it also restarts them when one dies; on a
cluster, whose nodes come and go, `shifts` begins another group. An error of ours that a worker meets is raised in
the driver as what it is, and not retried: a broken file does not mend.
"""

import importlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scarcade.engine.attended import Attended
from scarcade.engine.cluster import cluster, is_private
from scarcade.engine.errors import OpenError, ScarcadeError, StorageError, UsageError
from scarcade.engine.failures import explained, revived
from scarcade.engine.interrupts import Interrupts
from scarcade.engine.mailbox import Mailbox
from scarcade.engine.nodes import elsewhere
from scarcade.engine.scale import Scale
from scarcade.engine.shared_folder import marked, sees, unseen
from scarcade.engine.shifts import Shifts
from scarcade.engine.storage import Mirror, is_url
from scarcade.engine.train_here import in_this_process
from scarcade.engine.train_switches import remove_traces, switched, without_unused
from scarcade.engine.world import World, cores, use_threads

__all__ = ["Message", "Scale", "Work", "Worker", "run"]

Message = Mapping[str, Any]
_POLL_S = 0.2
_FATAL_S = 2.0  # how long a worker looks for the reason why another one went away, which was told before it went
_STUCK_S = 10.0  # how long it may stay in a collective after that
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
    needed = max(cores(), int(cpus * scale.workers + 0.999))
    launch = uuid.uuid4().hex
    if private and scale.min_workers is not None:
        tell({"note": "--scale.min-workers is for clusters, whose nodes can be lost: without one it changes nothing"})

    def begin(size: int, avoid: frozenset[str] = frozenset()) -> Attended:
        remove_traces(place)
        grant = _Grant(cpus, threads, place, launch, uuid.uuid4().hex, size)
        trainer = _trainer(work, arguments, scale, grant, avoid=avoid, restarts=private)
        without_unused(trainer)
        return Attended(trainer.fit, grant.group, size, in_this_process(trainer).set if is_private() else None)

    with switched(scale, restarts=private), cluster(scale.address, cpus=needed), marked(place, launch):
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
class _Grant:
    """What one group of workers asks of Ray."""

    cpus: float
    threads: int
    place: str
    launch: str
    group: str  # the name of its mailbox
    size: int


def _trainer(
    work: Work, arguments: Mapping[str, Any], scale: Scale, grant: _Grant, *, avoid: frozenset[str], restarts: bool
) -> Any:
    """Ray's TorchTrainer for `work`, on none of the nodes to `avoid`; it `restarts` workers that die, or ends."""
    train: Any = importlib.import_module("ray.train")
    torch_train: Any = importlib.import_module("ray.train.torch")
    above, name = _above(grant.place)
    return torch_train.TorchTrainer(
        _entry,
        train_loop_config={
            "work": f"{work.__module__}:{work.__qualname__}",
            "arguments": dict(arguments),
            "grant": asdict(grant),
        },
        scaling_config=train.ScalingConfig(
            num_workers=grant.size,
            use_gpu=scale.gpus,
            resources_per_worker=_resources(scale, grant.cpus),
            label_selector=elsewhere(avoid),
        ),
        torch_config=torch_train.TorchConfig(backend="nccl" if scale.gpus else "gloo", timeout_s=_COLLECTIVE_S),
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


# within a worker


@dataclass
class _Watch:
    """Looks into the mailbox now and then, beside the training."""

    mailbox: Mailbox
    stop: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        fatal_since: float | None = None
        while not self.ended.wait(_POLL_S):
            if self.mailbox.look("stop") is not None:
                self.stop.set()
            if self.mailbox.look("fatal") is not None:
                fatal_since = fatal_since or time.monotonic()
                if time.monotonic() - fatal_since > _STUCK_S:
                    os._exit(1)  # stuck in a collective that will never end; the next attempt says why


def _entry(config: dict[str, Any]) -> dict[str, Any]:
    """What every worker of Ray Train runs."""
    torch_train: Any = importlib.import_module("ray.train.torch")
    grant = _Grant(**config["grant"])
    use_threads(grant.threads)
    mailbox = Mailbox(grant.group)
    if (fatal := mailbox.look("fatal")) is not None:
        return {"error": fatal}
    world = World.joined(torch_train.get_device())
    where = _Where.here()
    mailbox.post(f"worker-{world.rank}", {"node": where.node})
    attempt = str(world.say({"attempt": uuid.uuid4().hex})["attempt"])
    watch = _Watch(mailbox)
    threading.Thread(target=watch.look, daemon=True).start()
    module, _, name = config["work"].partition(":")
    tell = partial(mailbox.send, attempt) if world.first else _nobody
    worker = Worker(world, tell, watch.stop.is_set, partial(_announce, grant.place, mailbox))
    try:
        if not sees(grant.place, grant.launch):
            raise unseen(grant.place, where.address)
        return {"result": getattr(importlib.import_module(module), name)(worker, config["arguments"])}
    except ScarcadeError as error:
        told = {"class": type(error).__name__, "message": f"{error}{where.told(error)}"}
        mailbox.post("fatal", told)
        world.leave()
        return {"error": told}
    except RuntimeError:
        deadline = time.monotonic() + _FATAL_S
        while time.monotonic() < deadline:
            if (fatal := mailbox.look("fatal")) is not None:
                return {"error": fatal}
            time.sleep(_POLL_S)
        raise
    finally:
        watch.ended.set()


@dataclass(frozen=True)
class _Where:
    """The node that a worker is on."""

    node: str
    address: str

    @classmethod
    def here(cls) -> "_Where":
        ray: Any = importlib.import_module("ray")
        return cls(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def told(self, error: ScarcadeError) -> str:
        """Behind an `error` of a file, where there are several machines that could lack it."""
        ray: Any = importlib.import_module("ray")
        several = sum(node["Alive"] for node in ray.nodes()) > 1
        return f" (on the node {self.address})" if several and isinstance(error, (OpenError, StorageError)) else ""


def _nobody(message: Message) -> None:
    """Whom the ranks above 0 tell."""


def _announce(place: str, mailbox: Mailbox, checkpoint: Path | None, step: int) -> None:
    """Report a committed checkpoint to Ray, which is told where it lies and copies nothing.

    Every rank must call it. Resuming never depends on it: the run's own folder is what is believed.
    """
    train: Any = importlib.import_module("ray.train")
    if checkpoint is not None:
        mailbox.post("checkpoint", {"step": step})
    reported = None
    if checkpoint is not None and is_url(place):
        mirror = Mirror(place)
        reported = train.Checkpoint(f"{mirror.root}/checkpoints/{checkpoint.name}", filesystem=mirror.filesystem)
    elif checkpoint is not None:
        reported = train.Checkpoint.from_directory(str(checkpoint))
    train.report({"step": step}, checkpoint=reported, checkpoint_upload_mode=train.CheckpointUploadMode.NO_UPLOAD)
