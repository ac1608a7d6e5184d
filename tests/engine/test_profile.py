import json
import time
from pathlib import Path

import pytest
import torch

from scarcade.engine.profile import PARTS, Stopwatch, of_all_workers
from scarcade.engine.world import World


def test_parts_sum_to_the_time_since_the_command_began(tmp_path: Path) -> None:
    began = time.time() - 2.0
    watch = Stopwatch(World(), began, tmp_path)
    watch.to("loading")
    time.sleep(0.05)
    watch.to("copying")
    watch.to("forward")
    time.sleep(0.02)
    watch.to("loading")
    found = watch.read(waited=0.03)
    assert sum(found.values()) == pytest.approx(time.time() - began, abs=0.5)
    assert found["start-up"] == pytest.approx(2.0, abs=0.5)
    assert found["waiting for data"] == 0.03
    assert found["preparing batches"] >= 0.02
    assert found["forward"] >= 0.02
    assert not list(tmp_path.iterdir())  # too few steps for a trace
    assert set(found) <= set(PARTS)
    (row,) = of_all_workers(found, World())
    assert row == {part: found.get(part, 0.0) for part in PARTS}


def test_a_trace_shows_the_operators_below_the_parts(tmp_path: Path) -> None:
    watch = Stopwatch(World(), time.time(), tmp_path / "profile")
    for _ in range(12):
        watch.to("copying")
        watch.to("forward")
        torch.ones(3) @ torch.ones(3)
        watch.to("loading")
    watch.read(0.0)
    events = json.loads((tmp_path / "profile" / "trace-0.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    assert names.count("forward") == 5
    assert names.count("aten::dot") == 5
