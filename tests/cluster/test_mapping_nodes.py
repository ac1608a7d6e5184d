"""Two raylets on one host, one of them killed in the middle of a mapping: every query exactly once in the end."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from scarcade.jobs.mapping import map_queries
from tests.cluster.nodes import QUICK, cluster_of
from tests.faults.mapping import MappingProcess, done, good_queries, made_reference, outcome, same

SETTINGS: dict[str, Any] = {"epochs": 3, "optim": {"lr": 0.01}, "threads": 1}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_node_is_lost_in_the_middle(tmp_path: Path, short: Path) -> None:
    reference, cells = made_reference(tmp_path)
    queries = good_queries(cells, tmp_path / "in", 16)
    map_queries(reference, queries, tmp_path / "whole", **SETTINGS).raise_if_failed()
    out = tmp_path / "out"
    with cluster_of(short / "ray", 1, 1, settings=QUICK) as nodes:
        mapping = MappingProcess(reference, queries, out, **SETTINGS, scale={"workers": 2, "address": nodes.address})
        mapping.start(**nodes.environment)
        before = mapping.reach(4)
        nodes.kill(1)
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
    with cluster_of(short / "ray", 1, 1, settings=QUICK) as nodes:
        mapping = MappingProcess(reference, queries, out, **SETTINGS, scale={"workers": 2, "address": nodes.address})
        mapping.start(**nodes.environment)
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
