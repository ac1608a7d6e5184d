"""Two raylets on one host, one of them killed in the middle of a mapping: every query exactly once in the end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from scarcade.jobs.mapping import map_queries
from tests.faults.mapping import MappingProcess, done, good_queries, made_reference, outcome, same

SETTINGS: dict[str, Any] = {"epochs": 3, "optim": {"lr": 0.01}, "threads": 1}
QUICK = {  # a dead node is noticed in two seconds instead of eighteen
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


class Nodes:
    """A Ray cluster of two nodes on this host, in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", told: dict[str, Any]) -> None:
        self._process, self.address = process, told["address"]
        self._second: list[int] = told["second"]

    def kill_second(self) -> None:
        """The second node's raylet and all that it started, as when a machine goes away."""
        for pid in self._second:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            for process in family:
                process.kill()

    def kill_all(self) -> None:
        """Both nodes, the cluster's head with them."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            process.kill()


CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False,
    "object_store_memory": 100 << 20})
second = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
cluster.wait_for_nodes()
pids = [p.process.pid for found in second.all_processes.values() for p in found]
print(json.dumps({"address": cluster.address, "second": pids}), flush=True)
sys.stdin.read()
"""


@contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    folder.mkdir()
    environment = {**os.environ, **QUICK, "RAY_TMPDIR": str(folder)}
    (folder / "ray").mkdir()
    with open(folder / "stderr", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        while line and not line.startswith("{"):
            line = process.stdout.readline()
        assert line, (folder / "stderr").read_text()[-2000:]
        yield Nodes(process, json.loads(line))
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in reversed(family):
            one.kill()
        process.communicate()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="sc-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(600)
def test_a_node_is_lost_in_the_middle(tmp_path: Path, short: Path) -> None:
    reference, cells = made_reference(tmp_path)
    queries = good_queries(cells, tmp_path / "in", 16)
    map_queries(reference, queries, tmp_path / "whole", **SETTINGS).raise_if_failed()
    out = tmp_path / "out"
    with two_nodes(short / "ray") as nodes:
        mapping = MappingProcess(reference, queries, out, **SETTINGS, scale={"workers": 2, "address": nodes.address})
        mapping.start(**QUICK)
        before = mapping.reach(4)
        nodes.kill_second()
        assert mapping.wait() == 0, mapping.errors.read_text()[-3000:]
    rows = json.loads((out / "summary.json").read_text())["queries"]
    assert [(row["name"], row["state"]) for row in rows] == [(path.stem, "done") for path in queries]
    assert before.items() <= done(out).items()
    for path in queries:
        assert same(outcome(tmp_path / "whole", path.stem), outcome(out, path.stem)), path.stem


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_cluster_is_lost(tmp_path: Path, short: Path) -> None:
    reference, cells = made_reference(tmp_path)
    queries = good_queries(cells, tmp_path / "in", 16)
    out = tmp_path / "out"
    with two_nodes(short / "ray") as nodes:
        mapping = MappingProcess(reference, queries, out, **SETTINGS, scale={"workers": 2, "address": nodes.address})
        mapping.start(**QUICK)
        mapping.reach(2)
        nodes.kill_all()
        began = time.monotonic()
        assert mapping.wait() == 5, mapping.errors.read_text()[-3000:]
        assert time.monotonic() - began < 60
    assert "gone" in mapping.errors.read_text()
    states = [row["state"] for row in json.loads((out / "summary.json").read_text())["queries"]]
    assert "failed" not in states
    mapping = MappingProcess(reference, queries, out, **SETTINGS)
    mapping.start()
    assert mapping.wait() == 0
    assert len(done(out)) == 16
