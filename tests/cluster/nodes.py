"""A Ray cluster of several nodes on this machine, whose nodes are killed and added as a test asks.

The cluster lives in a process of its own (``python -m tests.cluster.nodes CPUS_OF_HEAD CPUS_OF_SECOND ...``) that
takes one command a line; the token of its users is in its folder.
"""

import importlib
import json
import os
import secrets
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
# Ray's own times are what users have; processes in advance are never used and cost this machine's two cores
USUAL = {
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",  # else workers starve beside whatever else runs here
}
QUICK = {
    **USUAL,  # a dead node is noticed in two seconds instead of eighteen
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


class Nodes:
    """The cluster; node 0 is its head."""

    def __init__(self, process: "subprocess.Popen[str]", environment: Mapping[str, str]) -> None:
        self._process = process
        self.environment = dict(environment)  # what a driver needs to speak to it
        self.address = ""
        self._pids: list[list[int]] = []

    def hear(self) -> dict[str, Any]:
        """What the cluster's process tells next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        while line and not line.startswith("{"):
            line = self._process.stdout.readline()
        assert line, "the cluster ended"
        told: dict[str, Any] = json.loads(line)
        if "pids" in told:
            self.address = told["address"]
            self._pids.append(told["pids"])
        return told

    def _ask(self, command: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        self.hear()

    def add(self, cpus: int, *, blind_to: Path | None = None) -> int:
        """Another node; its number. It sees an empty folder where `blind_to` is."""
        self._ask({"add": cpus, "blind_to": str(blind_to) if blind_to else None})
        return len(self._pids) - 1

    def drain(self, number: int) -> None:
        """Announce that a node is to leave, as a cloud does before it takes a machine away."""
        self._ask({"drain": number})

    def kill(self, number: int) -> None:
        """A node's raylet and all that it started, as when a machine goes away."""
        family = []
        for pid in self._pids[number]:
            family += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in family:
            process.kill()

    def kill_all(self) -> None:
        """All nodes, the head with them."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            process.kill()

    def holds(self, number: int, pid: int) -> bool:
        """Whether process `pid` runs on that node."""
        return any(
            pid in [child.pid for child in psutil.Process(raylet).children(recursive=True)]
            for raylet in self._pids[number]
        )


@contextmanager
def cluster_of(folder: Path, *cpus: int, settings: Mapping[str, str] = USUAL) -> Iterator[Nodes]:
    """A cluster of nodes with so many cores each, with a token; `folder` must have a short path."""
    folder.mkdir(exist_ok=True)
    (folder / "ray").mkdir()
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment = {**os.environ, **settings, **access, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    with open(folder / "stderr", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.cluster.nodes", *map(str, cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=ROOT,
        )
    try:
        nodes = Nodes(process, {**settings, **access})
        for _ in cpus:
            nodes.hear()
        yield nodes
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in reversed(family):
            one.kill()
        process.communicate()


def main(cpus: list[int]) -> None:
    """Start the nodes, and do what is asked, a line of JSON each."""
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster()
    nodes: list[Any] = []

    def start(n: int) -> list[int]:
        head = {} if cluster.head_node is not None else {"include_dashboard": False}
        nodes.append(cluster.add_node(num_cpus=n, object_store_memory=100 << 20, **head))
        # the head's other processes are the cluster's, and not its raylet's
        return [one.process.pid for name, of in nodes[-1].all_processes.items() if "raylet" in name for one in of]

    def say(**told: Any) -> None:
        print(json.dumps(told), flush=True)

    for n in cpus:
        say(pids=start(n), address=cluster.address)
    for line in sys.stdin:
        asked = json.loads(line)
        if "drain" in asked:
            drain(cluster.address, nodes[asked["drain"]].node_id)
            say(drained=True)
        elif asked["blind_to"]:
            say(pids=[start_blind(cluster.address, asked["add"], asked["blind_to"])], address=cluster.address)
        else:
            say(pids=start(asked["add"]), address=cluster.address)


def start_blind(address: str, cpus: int, folder: str) -> int:
    """A node in a space of its own, where `folder` is an empty one of its own."""
    ray = f"{sys.executable} -W ignore -m ray.scripts.scripts start --address={address} --num-cpus={cpus}"
    script = f"mount -t tmpfs none {folder} && exec {ray} --object-store-memory={100 << 20} --block"
    process = subprocess.Popen(["unshare", "-rm", "sh", "-c", script], stdout=subprocess.DEVNULL)
    return process.pid


def drain(address: str, node: str) -> None:
    """Tell the cluster's head that the node goes in a minute."""
    raylet: Any = importlib.import_module("ray._raylet")
    messages: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
    reason = messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = raylet.GcsClient(address=address).drain_node(
        node, reason, "a test", int(time.time() * 1000) + 60_000
    )
    assert accepted, why


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main([int(text) for text in sys.argv[1:]])
