"""A Ray session: the caller's own, a running cluster that was named, or a private one for this process alone.

A private session is quiet, starts without a dashboard, lives in a temporary folder that only its owner can
read, and asks for a token of everybody who speaks to it. It never attaches to a cluster that happens to run
on the machine. Nothing of it outlives the driver, even if that is killed (`watchdog`).
"""

import importlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scarcade.engine import ahead, watchdog
from scarcade.engine.bare_head import bare
from scarcade.engine.errors import ClusterError, UsageError
from scarcade.engine.interrupts import kept_handlers

_PREFIX = "sc-ray-"
_SOCKET_LIMIT = 107  # bytes in the path of a unix socket on Linux
_SOCKET_TAIL = len("/s/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_FAST = {
    # processes started in advance are never used: ours all have an environment of their own
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",  # else 15: beside anything else that runs, training with workers would stand still
}
_STORE_MB = 256
HEAD_AWAY_S = 20.0  # how long a cluster's head may be away; Ray ends a driver whose head is away for 60 s
_private: set[Path] = set()  # the folder of the private session that is running
_token = secrets.token_hex(32)  # one for the process: Ray's own code reads it once and keeps it


@contextmanager
def cluster(
    address: str | None = None, *, cpus: int | None = None, gpus: int | None = None, object_store_mb: int = _STORE_MB
) -> Iterator[None]:
    """Ray is initialised within the block.

    Args:
        address: of a running cluster; default: RAY_ADDRESS, and without it a private session is started.
        cpus, gpus: what a private session has to give; default: what the machine has.
        object_store_mb: shared memory of a private session, in MB.

    Raises:
        ClusterError: no session could be had.
    """
    named = address or os.environ.get("RAY_ADDRESS")
    ahead.settle(cpus if named is None and gpus is None and object_store_mb == _STORE_MB else None)
    with _environment({"RAY_ENABLE_AUTO_CONNECT": "0"}):  # else what is left of a session that is over begins another
        import ray

    if ray.is_initialized():
        if address is not None:
            raise UsageError("--scale.address: this process is connected to a Ray cluster already")
        yield
        return
    with _environment(_QUIET):
        if named:
            _knock(named)
            _init(address=named)
            try:
                yield
            finally:
                ray.shutdown()
            return
        with _private_folder() as folder, _environment({**_FAST, **_secrets(folder)}):
            with bare():
                _init(
                    address="local",
                    num_cpus=cpus,
                    num_gpus=gpus,
                    include_dashboard=False,
                    object_store_memory=object_store_mb << 20,
                    _temp_dir=str(folder / "s"),  # Ray opens this one to everybody; ours around it stays shut
                )
            _private.add(folder)
            try:
                yield
            finally:
                _private.discard(folder)
                ray.shutdown()


def is_private() -> bool:
    """Whether the session that there is was started by `cluster`, for this process alone."""
    return bool(_private)


def _knock(address: str, *, patience_s: float = 10.0) -> None:
    """Find out in seconds what `ray.init` finds out in five minutes.

    Raises:
        ClusterError: nothing listens at `address`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or something that Ray understands
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=patience_s).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClusterError(f"--scale.address {address}: no Ray cluster answers there ({reason})") from error


def _init(**options: Any) -> None:
    """`ray.init` without its noise.

    Raises:
        ClusterError: with the address and Ray's reason.
    """
    import ray

    where = options["address"]
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), kept_handlers():
            warnings.simplefilter("ignore")
            ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="scarcade", **options)
    except Exception as error:  # of any class: a node that is too slow to start is a bare one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if where == "local":
            raise ClusterError(
                f"a local Ray session could not be started ({reason}); --workers 0 does without"
            ) from error
        raise ClusterError(f"--scale.address {where}: the Ray cluster could not be reached ({reason})") from error


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of the block; what the user has set goes first."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:
        for name in (*values, "RAY_AUTH_MODE"):  # Ray sets the latter itself when it starts a local session
            if name not in before:
                os.environ.pop(name, None)


def _secrets(folder: Path) -> dict[str, str]:
    """A token that only this user can read. Ray asks for it in every session that it starts by itself.

    (RAY_AUTH_MODE must not be set for that here: Ray reads it once, when it is imported.)
    """
    path = folder / "token"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(_token)
    return {"RAY_AUTH_TOKEN_PATH": str(path)}


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A temporary folder of mode 0700 whose path is short enough for the sockets in it."""
    home = Path(tempfile.gettempdir())
    if len(os.fsencode(home)) + len(_PREFIX) + 9 + _SOCKET_TAIL > _SOCKET_LIMIT:
        home = Path("/tmp")
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
    # -I -S: neither the user's paths nor site packages, so that it starts in milliseconds
    command = [sys.executable, "-I", "-S", str(Path(watchdog.__file__)), str(folder)]
    dog = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield folder
    finally:
        dog.communicate()  # the end of its input: it cleans up and ends


def check_alive(*, patience_s: float = 0.0) -> None:
    """Find out whether the head of the cluster that this process is connected to still listens.

    Args:
        patience_s: how long it may be away, as when it is restarted.

    Raises:
        ClusterError: it does not.
    """
    import ray

    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"the Ray cluster at {address} is gone ({error.strerror or error}); the same command continues"
                ) from error
        time.sleep(0.5)


class Room:
    """Whether the cluster is there, and has nodes that could take a worker, or a group of them at a time.

    Ray itself waits for ever for a node that never comes, and ends the driver with the cluster's last one.

    Args:
        needed: resources of one worker, as Ray calls them.
        patience_s: how long to wait for nodes that could take them.
        group: how many workers begin together or not at all.
    """

    def __init__(self, needed: Mapping[str, float], patience_s: float, *, group: int = 1) -> None:
        self._needed, self._patience, self._group = dict(needed), patience_s, group
        self._since: float | None = None  # when it was first seen that no node could

    def wait(self) -> None:
        """Return as soon as there are nodes that could take them.

        Raises:
            ClusterError: there is none, and none came.
        """
        while not self._fits():
            self.look()
            time.sleep(0.5)
        self._since = None

    def look(self) -> None:
        """Ask now and then while nothing happens.

        Raises:
            ClusterError: the cluster is gone, or had no nodes that could take them for too long.
        """
        check_alive()
        if self._fits():
            self._since = None
            return
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since >= self._patience:
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in self._needed.items())
            if self._group > 1:
                raise ClusterError(
                    f"the nodes of the cluster cannot give {self._group} workers {wanted} each (waited "
                    f"{self._patience:g} s); lower --workers, --threads or --scale.cpus-per-worker, or raise "
                    "--scale.start-seconds if nodes are to come"
                )
            raise ClusterError(
                f"no node of the cluster can give a worker {wanted} (waited {self._patience:g} s); lower --threads, "
                "--scale.cpus-per-worker or --scale.memory-per-worker, or raise --scale.start-seconds if one is to come"
            )

    def news(self) -> None:
        """Something was done, so there is room."""
        self._since = None

    def _fits(self) -> bool:
        ray: Any = importlib.import_module("ray")
        taken = sum(_room_on(node["Resources"], self._needed) for node in ray.nodes() if node["Alive"])
        return taken >= self._group


def _room_on(there: Mapping[str, float], needed: Mapping[str, float]) -> int:
    """How many workers that are given `needed` a node has room for."""
    # (with a little to spare: shares of a core do not divide exactly)
    return min((int(there.get(name, 0.0) / amount + 1e-6) for name, amount in needed.items() if amount), default=1)
