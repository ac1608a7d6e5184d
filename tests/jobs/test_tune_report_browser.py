"""The report of a search in a real browser: it draws, brushes, sorts, filters, fetches nothing; text stays text."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scarcade.jobs.tune_report import write_report
from scarcade.jobs.tune_trial import Trial
from tests.jobs.browser import Page, browser_or_skip, browsing
from tests.jobs.reports import HOSTILE
from tests.jobs.searches import SPACE, default_trial, searched

DRAWN = "+document.documentElement.dataset.drawn >= 1"
NAMES = (
    "[...document.querySelectorAll('#trials tbody tr:not([hidden]) td:first-child bdi')].map(one => one.textContent)"
)
KEPT = "document.getElementById('selected').textContent"
# Where an axis stands on the screen, its upper and its lower end; and a point of the curve of the best trial.
AXIS = """(k => {
  const box = document.querySelectorAll('#axes .dimension')[k].querySelector('.axis-line').getBoundingClientRect();
  return [box.left, box.top, box.bottom];
})(%d)"""
CURVE = """(() => {
  const path = document.querySelector('#curves path.trial.best');
  const at = path.getPointAtLength(path.getTotalLength() * 0.2).matrixTransform(path.getScreenCTM());
  return [at.x, at.y];
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of a usual search, one of 1,000 trials, and odd ones."""
    browser_or_skip()
    folder = tmp_path_factory.mktemp("reports")
    lost = [replace(trial, state="failed", curve=[], reason="no memory") for trial in searched(5)]
    one = searched(1)
    evil = [Trial(HOSTILE, {HOSTILE: HOSTILE}, "done", 2, [(1, 2.0), (2, 1.0)], reason=HOSTILE), *lost[:1]]
    made = {
        "20": (searched(20), SPACE),
        "1000": (searched(1000), SPACE),
        "1": (one, SPACE),
        "lost": (lost, SPACE),
        "none": ([Trial("a", {}, "waiting"), Trial("b", {}, "running")], {}),
        "point": ([Trial("a", {"seed": 1}, "running", 1, [(1, 5.0)])], {"seed": {"grid": [1]}}),
        "evil": (evil, {HOSTILE: {"choice": [HOSTILE, HOSTILE + "2"]}}),
    }
    return {
        name: write_report(
            folder / f"{name}.html",
            title=HOSTILE if name == "evil" else "scvi on atlas.zarr",
            objective=HOSTILE if name == "evil" else "elbo",
            mode="min",
            space=space,
            trials=trials,
            defaults=default_trial() if name == "20" else None,
        )
        for name, (trials, space) in made.items()
    }


def opened(page: Page, path: Path) -> float:
    page.dark(False)
    page.size(1280, 900)
    page.complaints.clear()
    page.requests.clear()
    took = page.open(path)
    page.until(DRAWN)
    return took


def mouse(page: Page, kind: str, x: float, y: float) -> None:
    page.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)


def press(page: Page, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        page.tell("Input.dispatchKeyEvent", type=kind, key=key, **({"text": key} if len(key) == 1 else {}))


def test_everything_is_drawn_and_nothing_is_asked_for(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["20"])
    assert page.run("document.querySelectorAll('#curves .trial').length") >= 19
    assert page.run("document.querySelectorAll('#axes path.trial').length") == 21
    assert page.run("document.querySelectorAll('#axes .dimension').length") == 7
    assert page.run("document.querySelectorAll('#each svg').length") == 6
    assert page.run("document.querySelectorAll('#each svg circle.trial.best').length") == 6
    assert page.run("document.querySelectorAll('#curves .trial.default').length") == 1
    light = page.run("getComputedStyle(document.querySelector('#curves path.best')).stroke")
    page.dark(True)
    assert page.run("getComputedStyle(document.querySelector('#curves path.best')).stroke") != light
    assert page.complaints == []
    assert page.requests == [reports["20"].as_uri()]


@pytest.mark.parametrize("which", ["1", "lost", "none", "point"])
def test_a_search_of_few_or_failed_trials_is_drawn(which: str, page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports[which])
    page.run("document.getElementById('closer').click()")
    pictures = page.run("[...document.querySelectorAll('svg')].map(one => one.outerHTML).join()")
    assert not re.search("NaN|Infinity|undefined", pictures)
    assert page.complaints == []


def test_pointing_at_a_curve_names_its_trial_everywhere(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["20"])
    page.run("document.getElementById('curves').scrollIntoView({block: 'center'})")
    page.point(*page.run(CURVE))
    page.until("!document.getElementById('tip').hidden")
    name = page.run("document.querySelector('#trials tr.best bdi').textContent")
    told = page.run("document.getElementById('tip').innerText")
    assert told.startswith(f"{name}\ndone, 30 epochs\nelbo 7")
    assert "optim.lr 0.00" in told
    assert page.run("document.querySelector('tr.lit bdi').textContent") == name
    assert page.run("document.querySelector('#axes path.lit').getAttribute('d').length") > 20
    page.point(1, 1)
    page.until("document.getElementById('tip').hidden")


def test_dragging_on_an_axis_keeps_trials_in_all_of_the_page(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["20"])
    page.run("document.getElementById('axes').scrollIntoView({block: 'center'})")
    x, top, bottom = page.run(AXIS % 4)  # the learning rate
    mouse(page, "mousePressed", x, top + 1)
    mouse(page, "mouseMoved", x, (top + bottom) / 2)
    mouse(page, "mouseReleased", x, (top + bottom) / 2)
    kept = len(page.run(NAMES))
    assert 0 < kept < 21
    assert page.run(KEPT) == f"{kept} of 21 trials are kept"
    assert page.run("document.querySelectorAll('#axes path.trial:not(.out)').length") == kept
    assert page.run("document.querySelectorAll('#each figure:first-child circle.trial.out').length") > 0
    rates = page.run(
        "[...document.querySelectorAll('#trials tbody tr:not([hidden])')].map(r => +r.cells[10].textContent)"
    )
    assert min(rates) >= 1e-3 * 0.95
    mouse(page, "mousePressed", x, bottom - 5)
    mouse(page, "mouseReleased", x, bottom - 5)
    assert len(page.run(NAMES)) == 21


def test_a_click_on_a_listed_value_keeps_it(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["20"])
    page.run("document.getElementById('axes').scrollIntoView({block: 'center'})")
    x, top, bottom = page.run(AXIS % 2)
    mouse(page, "mousePressed", x, bottom - (bottom - top) / 4)
    mouse(page, "mouseReleased", x, bottom - (bottom - top) / 4)
    found = page.run(
        "[...document.querySelectorAll('#trials tbody tr:not([hidden])')].map(r => r.cells[8].textContent)"
    )
    assert set(found) == {"zinb"}
    page.run("document.getElementById('clear').click()")
    assert len(page.run(NAMES)) == 21
    assert page.run("document.querySelectorAll('.trial.out').length") == 0


def test_axes_and_rows_can_be_worked_by_the_keyboard(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["20"])
    page.run("[...document.querySelectorAll('#axes .dimension')].at(-1).focus()")
    told = "document.activeElement.getAttribute('aria-valuetext')"
    assert page.run(told) == "all trials are kept"
    press(page, "ArrowUp")
    narrow = len(page.run(NAMES))
    assert 0 < narrow < 10
    assert page.run(told).startswith("707.8 to 7")
    press(page, "+")
    assert len(page.run(NAMES)) > narrow
    press(page, "Escape")
    assert len(page.run(NAMES)) == 21
    page.run("document.querySelector('#trials tbody tr[tabindex=\"0\"]').focus()")
    press(page, "ArrowDown")
    assert page.run("document.activeElement.querySelector('bdi').textContent") == page.run(NAMES)[1]
    assert page.run("document.querySelector('#curves path.lit').getAttribute('d').length") > 20
    assert page.complaints == []


def test_the_table_is_sorted_and_filtered(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["20"])
    values = "[...document.querySelectorAll('#trials tbody tr')].map(r => r.cells[%d].textContent)"
    found = [float(text) for text in page.run(values % 2) if text]
    assert found == sorted(found)
    page.run("document.querySelectorAll('#trials th button')[10].click()")
    rates = [float(text) for text in page.run(values % 10)]
    assert rates == sorted(rates)
    page.run("document.querySelectorAll('#trials th button')[10].click()")
    assert [float(text) for text in page.run(values % 10)] == rates[::-1]
    page.run("document.querySelectorAll('#trials th button')[0].click()")
    assert page.run(NAMES)[:3] == ["defaults", "trial-0000", "trial-0001"]
    page.run("const s = document.getElementById('state'); s.value = 'failed'; s.dispatchEvent(new Event('input'))")
    assert page.run(NAMES) == ["trial-0007", "trial-0017"]
    assert page.run("document.getElementById('count').textContent") == "2 of 21 shown"


def test_the_best_configuration_can_be_copied(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["20"])
    page.run("document.getElementById('copy').click()")
    page.until("document.getElementById('copied').textContent !== ''")
    assert page.run("window.getSelection().toString()").startswith("[model]\nn_latent = ")


def test_a_thousand_trials_open_and_are_brushed(page: Page, reports: dict[str, Path]) -> None:
    assert opened(page, reports["1000"]) < 20  # under 2 s where nothing else runs
    page.run("[...document.querySelectorAll('#axes .dimension')].at(-1).focus()")
    press(page, "ArrowUp")
    kept = len(page.run(NAMES))
    assert 0 < kept < 1000
    page.run("document.querySelectorAll('#trials th button')[0].click()")
    names = page.run(NAMES)
    assert names == sorted(names)
    assert len(names) == kept
    assert page.complaints == []


def test_hostile_text_stays_text(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["evil"])
    page.run("document.getElementById('curves').scrollIntoView({block: 'center'})")
    page.point(*page.run(CURVE))
    page.until("!document.getElementById('tip').hidden")
    assert "</script>" in page.run("document.getElementById('tip').innerText")
    assert page.run("document.title").startswith("scarcade: </script>")
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.complaints == []
    assert len(page.requests) == 1


def test_without_its_script_the_page_can_be_read(page: Page, reports: dict[str, Path]) -> None:
    page.scripts(False)
    try:
        page.open(reports["20"])
        assert page.run("document.querySelector('noscript p').textContent").startswith("Scripts are off")
        assert page.run("document.getElementById('drawn').hidden")
        assert page.run("document.querySelectorAll('#trials tbody tr').length") == 21
        assert page.run("document.getElementById('toml').textContent").startswith("[model]")
    finally:
        page.scripts(True)


def test_it_fits_a_telephone_and_is_drawn_again_for_it(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["20"])
    page.size(420, 900)
    page.until("+document.documentElement.dataset.drawn >= 2")
    assert page.run("document.documentElement.scrollWidth") <= 420
    assert page.complaints == []
