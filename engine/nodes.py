"""The nodes of a cluster: which of them answer, and for how many workers there is room on them.

Ray takes twenty seconds to believe that a node is gone, and until then would put workers on it. Here a node is asked
by a connection to its raylet, and those that do not answer are left out. Room is found by asking for it: a `Seats`
reserves the place of one worker each, which also tells an autoscaler what is wanted.
"""

import importlib
import socket
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_ANSWER_S = 3.0  # a raylet that lives accepts a connection at once
NODE_ID = "ray.io/node-id"  # the label that every node of Ray has


def silent() -> set[str]:
    """Ids of the nodes that Ray takes for alive and that do not answer."""
    ray: Any = importlib.import_module("ray")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(max(1, min(32, len(nodes)))) as pool:
        answers = list(pool.map(_answers, nodes))
    return {node["NodeID"] for node, there in zip(nodes, answers, strict=True) if not there}


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def lost_of(used: Collection[str]) -> str:
    """Of the nodes `used` (ids), the addresses of those that are gone or do not answer, with commas."""
    ray: Any = importlib.import_module("ray")
    gone = silent() | {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
    return ", ".join(sorted(_name(node) for node in ray.nodes() if node["NodeID"] in gone.intersection(used)))


def leaving(used: Collection[str]) -> str:
    """Of the nodes `used` (ids), the addresses of those that the cluster has begun to drain, with commas."""
    ray: Any = importlib.import_module("ray")
    drained = _drained()
    return ", ".join(sorted(_name(node) for node in ray.nodes() if node["NodeID"] in drained.intersection(used)))


def unwanted() -> set[str]:
    """Ids of the nodes on which no worker should begin: they do not answer, or are to leave."""
    return silent() | _drained()


def _drained() -> set[str]:
    return set(importlib.import_module("ray._private.state").state.get_draining_nodes())


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def elsewhere(avoid: Collection[str]) -> dict[str, str] | None:
    """The label selector of every node but those to `avoid` (ids); None: any node will do."""
    return {NODE_ID: f"!in({','.join(sorted(avoid))})"} if avoid else None


class Seats:
    """`n` places of one worker each, asked of Ray and kept until `release`.

    Args:
        needed: resources of one worker, as Ray calls them.
        avoid: ids of nodes on which none is wanted.
    """

    def __init__(self, needed: Mapping[str, float], n: int, avoid: Collection[str] = ()) -> None:
        groups: Any = importlib.import_module("ray.util.placement_group")
        selector = elsewhere(avoid)
        self._table, self._remove = groups.placement_group_table, groups.remove_placement_group
        self._groups = [
            groups.placement_group([dict(needed)], bundle_label_selector=[selector] if selector else None)
            for _ in range(n)
        ]

    def taken(self) -> int:
        """How many of them Ray has given."""
        return sum(self._table(group).get("state") == "CREATED" for group in self._groups)

    def release(self) -> None:
        """Give all of them back."""
        for group in self._groups:
            self._remove(group)
        self._groups = []
