"""kill -9 of the driver of a mapping, and a tidy stop: the same command again maps what is not done, and that alone."""

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from scarcade.jobs.mapping import map_queries
from tests.faults.mapping import MappingProcess, done, good_queries, made_reference, outcome, same

SETTINGS: dict[str, Any] = {"epochs": 3, "optim": {"lr": 0.01}, "threads": 1}


class Case:
    """A reference, queries, and what they are without a fault."""

    def __init__(self, folder: Path, n: int) -> None:
        self.reference, cells = made_reference(folder)
        self.queries = good_queries(cells, folder / "in", n)
        map_queries(self.reference, self.queries, folder / "whole", **SETTINGS).raise_if_failed()
        self.whole = folder / "whole"

    def check(self, out: Path) -> None:
        """Every query exactly once, as without a fault, and nothing left about."""
        rows = json.loads((out / "summary.json").read_text())["queries"]
        assert [row["name"] for row in rows] == [path.stem for path in self.queries]
        assert {row["state"] for row in rows} == {"done"}
        assert len(list(out.glob("*.h5ad"))) == len(list(out.glob("*.delta"))) == len(rows)
        for path in self.queries:
            assert same(outcome(self.whole, path.stem), outcome(out, path.stem)), path.stem
        assert not list(out.glob(".tmp*"))
        assert not list((out / ".records").glob(".*"))


def ended(family: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(family, timeout=seconds)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("workers", "n"),
    [(1, 6), pytest.param(0, 30, marks=pytest.mark.slow), pytest.param(2, 40, marks=pytest.mark.slow)],
)
def test_the_driver_is_killed_twice(workers: int, n: int, tmp_path: Path) -> None:
    case, out = Case(tmp_path, n), tmp_path / "out"
    mapping = MappingProcess(case.reference, case.queries, out, **SETTINGS, workers=workers)
    before: dict[str, int] = {}
    for share in (1 / 3, 2 / 3):
        mapping.start()
        mapping.reach(int(n * share))
        family = mapping.kill()
        if workers:
            assert len(family) > 4
        assert ended(family, 8)
        now = done(out)
        assert before.items() <= now.items()  # what was done is not done again
        before = now
    assert n / 2 < len(before) < n
    mapping.start()
    assert mapping.wait() == 0, mapping.errors.read_text()[-3000:]
    assert before.items() <= done(out).items()
    case.check(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [0, 2])
def test_asked_to_end_it_tells_what_is_done_and_goes_on_later(
    workers: int, number: int, code: int, tmp_path: Path
) -> None:
    case, out = Case(tmp_path, 12), tmp_path / "out"
    mapping = MappingProcess(case.reference, case.queries, out, **SETTINGS, workers=workers)
    mapping.start()
    mapping.reach(3)
    assert mapping.process is not None
    family = psutil.Process(mapping.process.pid).children(recursive=True)
    assert mapping.send(number) == code
    assert ended(family, 8)
    states = [row["state"] for row in json.loads((out / "summary.json").read_text())["queries"]]
    assert set(states) == {"done", "skipped"}
    before = done(out)
    mapping.start()
    assert mapping.wait() == 0, mapping.errors.read_text()[-3000:]
    assert before.items() <= done(out).items()
    case.check(out)
