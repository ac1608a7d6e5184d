"""What the report of a search holds, read from its HTML and its data; test_tune_report_browser.py opens it."""

import html
import json
import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scarcade.engine.errors import StorageError
from scarcade.jobs.tune_report import compared, to_toml, write_report
from scarcade.jobs.tune_report_data import best_of, drawing, fenced, number, ranked, reached, shades, text_of
from scarcade.jobs.tune_trial import Trial
from tests.jobs.reports import HOSTILE
from tests.jobs.searches import DEFAULTS, OUT_OF_MEMORY, SPACE, default_trial, searched


def written(folder: Path, trials: list[Trial], **given: Any) -> str:
    settings: dict[str, Any] = {"title": "scvi on atlas.zarr", "objective": "elbo", "mode": "min", "space": SPACE}
    return write_report(folder / "report.html", **{**settings, **given}, trials=trials).read_text()


def drawn(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'id="drawing">(.*?)</script>', page, re.S)
    values: dict[str, Any] = json.loads(found)
    return values


def seen(page: str) -> str:
    """The text of a page, without what its script and style say."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def trial(name: str, curve: list[float], **given: Any) -> Trial:
    points = list(enumerate(curve, start=1))
    return Trial(**{"name": name, "parameters": {}, "state": "done", "curve": points, "epochs": len(curve), **given})


def test_the_best_configuration_comes_first_and_is_compared_with_the_defaults(tmp_path: Path) -> None:
    trials, usual = searched(20), default_trial()
    page = written(tmp_path, trials, defaults=usual)
    text = seen(page)
    place = best_of(ranked(trials, "min", None), "min")
    assert place is not None
    best, value = trials[place], trials[place].best("min")
    assert value is not None
    assert f"{best.name} : elbo {number(value)} after epoch" in text
    assert "better than the defaults (711.7)" in text
    (toml,) = re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.S)
    read = tomllib.loads(html.unescape(toml))
    assert read == {
        table: {name.split(".")[1]: best.parameters[name] for name in SPACE if name.startswith(f"{table}.")}
        for table in ("model", "optim", "data")
    }
    assert f"model.n_latent {best.parameters['model.n_latent']} 10" in text


def test_counts_and_reasons_are_told(tmp_path: Path) -> None:
    text = seen(written(tmp_path, searched(20), defaults=default_trial()))
    assert "20 trials" in text
    assert "2 failed" in text
    assert f"2 trials failed 2 of them {OUT_OF_MEMORY}" in text
    assert "defaults" in text
    assert len(re.findall("stopped early", text)) >= 8


def test_trials_stand_in_the_table_best_first_and_those_without_a_value_last(tmp_path: Path) -> None:
    trials = [trial("a", [3, 2]), trial("b", []), trial("c", [1, math.nan]), trial("d", [math.inf, 1])]
    page = written(tmp_path, trials)
    assert re.findall(r'<tr id="t-(\d)"', page) == ["2", "3", "0", "1"]
    assert re.findall(r'<tr id="t-(\d)"', written(tmp_path, trials, mode="max")) == ["0", "2", "3", "1"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_search_without_a_value_is_a_report(mode: str, tmp_path: Path) -> None:
    lost = [trial(f"t{i}", [], state="failed", reason="no counts", epochs=0, parameters=DEFAULTS) for i in range(3)]
    text = seen(written(tmp_path, lost, mode=mode))
    assert "3 trials failed 3 of them no counts" in text
    assert "No trial has a value of the objective." in text
    later = [trial("t0", [], state="waiting"), trial("t1", [], state="running")]
    assert "No trial has a value of the objective yet." in seen(written(tmp_path, later, mode=mode))
    assert "0 trials" in seen(written(tmp_path, [], mode=mode))


def test_one_that_failed_is_never_the_best(tmp_path: Path) -> None:
    trials = [trial("good", [5, 4]), trial("lost", [3, 1], state="failed", reason="killed")]
    assert "good : elbo 4 after epoch 2" in seen(written(tmp_path, trials))
    assert best_of(ranked(trials[1:], "min", None), "min") is None


def test_only_finite_values_are_drawn_and_the_data_are_strict_json(tmp_path: Path) -> None:
    trials = [
        trial("a", [math.nan, 3, math.inf, 2], parameters={"optim.lr": 1e-3}, metrics={"kl": math.nan}),
        trial("b", [1, 2], parameters={"optim.lr": math.nan}),
    ]
    page = written(tmp_path, trials, space={"optim.lr": {"loguniform": [1e-4, 1e-2]}})
    assert not re.search("NaN|Infinity", re.findall(r'id="drawing">(.*?)</script>', page)[0])
    assert drawn(page)["trials"][0]["curve"] == [[2, 4], [3, 2]]


def test_hostile_text_is_text(tmp_path: Path) -> None:
    bad = {HOSTILE: HOSTILE, "model.x": HOSTILE}
    trials = [
        trial(HOSTILE, [2, 1], parameters=bad, metrics={HOSTILE: 1.0}),
        trial("b", [], parameters=bad, state="failed", reason=HOSTILE * 50),
    ]
    space = {HOSTILE: {"choice": [HOSTILE, "y"]}, "model.x": {"choice": [HOSTILE]}}
    page = written(tmp_path, trials, title=HOSTILE, objective=HOSTILE, space=space)
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert "pwned'</script>" not in page
    assert "{{ 7*7 }}" in html.unescape(page)


def test_axes_are_those_of_the_space(tmp_path: Path) -> None:
    trials = searched(30)
    moved = replace(trials[0], parameters={**trials[0].parameters, "optim.lr": 0.02, "model.n_latent": 50, "new": True})
    axes = {one["name"]: one for one in drawn(written(tmp_path, [moved, *trials[1:]]))["axes"]}
    assert list(axes) == [*SPACE, "new"]
    assert axes["optim.lr"] == {"name": "optim.lr", "kind": "log", "low": 1e-4, "high": 0.02, "whole": False}
    assert axes["model.dropout_rate"]["kind"] == "linear"
    assert axes["model.n_latent"] == {"name": "model.n_latent", "kind": "choice", "values": ["10", "20", "30", "50"]}
    assert axes["new"]["values"] == ["true"]


def test_places_are_values_or_numbers_in_the_list() -> None:
    found = drawing(ranked([trial("a", [1], parameters=DEFAULTS)], "min", None), "elbo", "min", SPACE)
    assert found["trials"][0]["places"] == [0, 1, 0, 0.1, 0.001, 1]
    assert drawing(ranked([trial("a", [1])], "min", None), "elbo", "min", SPACE)["trials"][0]["places"] == [None] * 6


def test_shades_go_by_rank() -> None:
    trials = [trial(str(i), [float(i)]) for i in range(18)] + [trial("none", [])]
    assert shades(ranked(trials, "min", None), "min") == [8 - i // 2 for i in range(18)] + [None]
    assert shades(ranked(trials, "max", None), "max")[:2] == [0, 0]
    assert shades(ranked(trials[:1], "min", None), "min") == [8]


def test_one_trial_that_went_astray_does_not_squeeze_the_others() -> None:
    values = [700.0 + i for i in range(20)]
    assert fenced([*values, 1e9], "min") == (700, 719)
    assert fenced([*values, -1e9], "max") == (700, 719)
    assert fenced([*values, 1.0], "min") == (1, 719)  # a better one is never left out
    assert fenced([3.0], "min") == (3, 3)
    assert fenced([], "min") is None
    trials = [trial(str(i), [value]) for i, value in enumerate(values)]
    stopped = [trial(f"s{i}", [900.0 + i], state="stopped") for i in range(20)]
    assert reached(ranked([*trials, *stopped], "min", None), "min") == (700, 757)


def test_long_curves_are_thinned_and_keep_their_ends_and_their_best(tmp_path: Path) -> None:
    curve = [1000.0 - i for i in range(1000)]
    curve[501] = 0.5
    epochs, values = drawn(written(tmp_path, [trial("a", curve)]))["trials"][0]["curve"]
    assert len(epochs) <= 120
    assert (epochs[0], epochs[-1]) == (1, 1000)
    assert values[epochs.index(502)] == 0.5


def test_the_defaults_are_one_more_trial_unless_they_are_among_them(tmp_path: Path) -> None:
    usual = default_trial()
    for trials in (searched(3), [*searched(3), usual]):
        found = drawn(written(tmp_path, trials, defaults=usual))["trials"]
        assert [one["default"] for one in found] == [False, False, False, True]


def test_numbers_values_and_comparisons_in_words() -> None:
    assert [number(value) for value in (0.001234567, 812.345, 123456.7, 1.5e-7)] == [
        "0.001235",
        "812.3",
        "123,457",
        "1.5e-07",
    ]
    assert [text_of(value) for value in (True, None, [1, 2], "x", 1e-3, 5)] == [
        "true",
        "null",
        "[1, 2]",
        "x",
        "0.001",
        "5",
    ]
    assert compared(90.0, 100.0, "min") == "10 % better than the defaults (100)"
    assert compared(0.8, 1.0, "max") == "20 % worse than the defaults (1)"
    assert compared(1.0, 0.0, "max") == "better than the defaults (0)"
    assert compared(2.0, 2.0, "min") == "as good as the defaults (2)"
    assert to_toml({"model.a": None, "seed": 3}) == "# model.a is not set\nseed = 3\n"


def test_a_thousand_trials_are_written_fast_and_small(tmp_path: Path) -> None:
    trials = searched(1000, epochs=200)
    page = written(tmp_path, trials)
    assert len(page) < 3_000_000


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"report\.html"):
        written(tmp_path / "gone", searched(2))
