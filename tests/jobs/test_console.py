"""Progress in a log, tables, and whose warnings are shown."""

import io
import warnings

import pytest

from scarcade.jobs.console import Bar, mapping_table, only_our_warnings, record, seconds, table, training_told


@pytest.mark.parametrize(("value", "told"), [(0.4, "0 s"), (47, "47 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations(value: float, told: str) -> None:
    assert seconds(value) == told


def test_a_log_gets_plain_lines_with_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("scarcade.jobs.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Bar("reading", stream=stream) as bar:
        for done in range(0, 5001, 100):
            bar(done, 5000)
            now[0] += 1.0
        bar.line("a note")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "reading: 1,000 of 5,000 cells, 100 cells/s, 40 s left"
    assert lines[-2] == "reading: 5,000 of 5,000 cells, 100 cells/s"
    assert lines[-1] == "a note"
    assert len(lines) == 6


def test_resumed_work_does_not_count_for_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("scarcade.jobs.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Bar("training", stream=stream) as bar:
        bar(1_000_000, 2_000_000)
        now[0] = 100.0
        bar(1_001_000, 2_000_000)
    assert "10 cells/s" in stream.getvalue()


def test_metrics_move_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with Bar("training", stream=stream) as bar:
        told = training_told(bar)
        told({"warning": "careful"})
        line = {"epochs": 2, "steps_per_epoch": 10, "epoch": 1, "step": 20, "cells": 200, "wait": 0.5}
        told({**line, "train/elbo": 12.345})
    assert stream.getvalue().splitlines() == [
        "warning: careful",
        "training: 200 of 200 cells, epoch 2 of 2, train/elbo 12.35, waiting for data 50%",
    ]


def test_tables_are_columns() -> None:
    assert table(("name", "n"), [("a", 5), ("bcd", 12)]).splitlines() == [
        "name   n",
        "----  --",
        "a      5",
        "bcd   12",
    ]
    assert record({"a": 1, "long": 2}) == "a     1\nlong  2"


def test_a_failed_query_is_a_line_too() -> None:
    text = mapping_table([{"name": "q", "state": "failed", "seconds": 0.1, "n_cells": None}])
    assert text.splitlines()[-1].split() == ["q", "failed", "0.1"]


def test_only_our_warnings_reach_a_user(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        only_our_warnings(debug=False)
        warnings.warn_explicit("of theirs", UserWarning, "/usr/lib/python3/numpy/x.py", 1)
        warnings.warn_explicit("old", DeprecationWarning, __file__, 1)
        ours = __file__.replace("tests/jobs/test_console.py", "jobs/mapping.py")
        warnings.warn_explicit("of ours", UserWarning, ours, 1)
    assert capsys.readouterr().err == "warning: of ours\n"
