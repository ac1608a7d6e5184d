"""What a worker of Ray Train does: it joins the others, runs the piece of training, and tells how it ended."""

import importlib
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scarcade.engine.errors import OpenError, ScarcadeError, StorageError
from scarcade.engine.launch import Grant, Message, Worker
from scarcade.engine.mailbox import Mailbox
from scarcade.engine.shared_folder import sees, unseen
from scarcade.engine.storage import Mirror, is_url
from scarcade.engine.world import World, meeting_place, met, use_threads

_POLL_S = 0.2
_FATAL_S = 2.0  # how long a worker looks for the reason why another one went away, which was told before it went
_STUCK_S = 10.0  # how long it may stay in a collective after that


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


def attempt(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker of Ray Train does with what `launch` gave it."""
    grant = Grant(**config["grant"])
    use_threads(grant.threads)
    mailbox = Mailbox(grant.group)
    if (fatal := mailbox.look("fatal")) is not None:
        return {"error": fatal}
    world = _world(grant.gpus)
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


def _world(gpus: bool) -> World:
    """The world of all workers: on GPUs the group that Ray made, else their own, which meets where rank 0 says."""
    if gpus:
        torch_train: Any = importlib.import_module("ray.train.torch")
        return World.joined(torch_train.get_device())
    train: Any = importlib.import_module("ray.train")
    context = train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    if size == 1:
        return World()
    collective: Any = importlib.import_module("ray.train.collective")
    host = _Where.here().address
    own = meeting_place(host, size) if rank == 0 else None
    told = collective.broadcast_from_rank_zero(None if own is None else {"host": host, "port": own.port})
    return met(rank, size, own or (told["host"], told["port"]), torch.device("cpu"))
