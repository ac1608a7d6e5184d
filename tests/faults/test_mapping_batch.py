"""Ten bad queries among good ones, each bad in its own way: the good ones come out as if they had not been there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scarcade.engine.errors import PartialError
from scarcade.jobs.mapping import map_queries
from tests.faults.mapping import BAD, bad_queries, good_queries, killing_readers_of, made_reference, outcome, same

SETTINGS: dict[str, Any] = {"epochs": 3, "optim": {"lr": 0.01}, "batch_size": 1_000_000, "threads": 1}
LIMIT = "800MB"
REASONS = {
    "cut": "truncated",
    "normalised": "fractions",
    "foreign": "none of its 60 genes",
    "nan": "not finite",
    "nothing": "not a readable .h5ad",
    "pickled": "not a readable .h5ad",
    "greedy": f"needs more than the {LIMIT} of memory.*--scale.memory-per-worker",
    "poison": "failed twice, the second time alone in its worker: .*SIGKILL",
    "dangling": "there is no such file",
    "long": "a value of 1,000,000 characters",
}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "n_good",
    [8, pytest.param(90, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])],
)
def test_ten_bad_queries_are_set_aside_with_ten_reasons_and_change_nothing(n_good: int, tmp_path: Path) -> None:
    reference, cells = made_reference(tmp_path)
    folder = tmp_path / "in"
    good = good_queries(cells, folder, n_good)
    alone = map_queries(reference, good, tmp_path / "alone", **SETTINGS)
    alone.raise_if_failed()
    bad_queries(good[0], folder, greedy_cells=600_000)
    with killing_readers_of(folder / "poison.h5ad") as killed:
        result = map_queries(
            reference,
            folder,
            tmp_path / "out",
            scale={"workers": 2, "memory_per_worker": LIMIT},
            **SETTINGS,
        )
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "summary.json").read_text())["queries"]}
    assert {name for name, row in rows.items() if row["state"] == "failed"} == set(BAD)
    assert len(rows) == n_good + len(BAD)
    for name in BAD:
        assert re.search(REASONS[name], rows[name]["reason"]), rows[name]
        assert len(rows[name]["reason"]) < 1000
        assert not list((tmp_path / "out").glob(f"{name}.*"))
    assert len({rows[name]["reason"] for name in BAD}) == len(BAD)
    for path in good:
        assert rows[path.stem]["state"] == "done"
        assert same(outcome(tmp_path / "alone", path.stem), outcome(tmp_path / "out", path.stem)), path.stem
    assert len(killed) == 2  # with its pack, and alone
    by_name = {record["name"]: record for record in result.queries}
    assert (by_name["poison"]["exit_code"], by_name["greedy"]["error"]) == (5, "E_MEMORY")
    assert not Path("hacked").exists()
    assert not list((tmp_path / "out").glob(".tmp*"))
    assert not [path for path in (tmp_path / "out" / ".records").iterdir() if path.name.startswith(".")]
    with pytest.raises(PartialError, match=rf"10 of {n_good + 10} queries could not be mapped"):
        result.raise_if_failed()
