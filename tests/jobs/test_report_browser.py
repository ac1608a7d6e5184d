"""The report in a real browser: it draws, sorts and filters, asks for nothing, and hostile text stays text."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scarcade.jobs.mapping import map_queries
from scarcade.jobs.report import UNFOLDED, write_report
from scarcade.jobs.report_words import short
from tests.jobs.browser import Page, browser_or_skip, browsing
from tests.jobs.conftest import Atlas
from tests.jobs.reports import HOSTILE, SETTINGS, crowd, hostile_report, job_of

DRAWN = "+document.documentElement.dataset.drawn >= 1"
# How many colours a canvas holds, and the middle of a cell of the query: a spot of the first label's colour.
COLOURS = """(canvas => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
})(document.querySelector(".picture canvas"))"""
SPOT = """(canvas => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const box = canvas.getBoundingClientRect();
  const coloured = i => data[i + 3] > 200 && Math.max(...data.slice(i, i + 3)) - Math.min(...data.slice(i, i + 3)) > 60;
  for (let i = 0; i < data.length; i += 4) {  // the reference's cells and all text are grey
    const [x, y] = [i / 4 % canvas.width, Math.floor(i / 4 / canvas.width)];
    if (coloured(i)) return [box.left + 1 + x, box.top + 1 + y];
  }
})(document.querySelector(".picture canvas"))"""
NAMES = "[...document.querySelectorAll('#queries tbody tr:not([hidden]) bdi')].map(one => one.textContent)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def reports(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of one query, one of 500, and one of hostile ones."""
    browser_or_skip()
    found = {}
    for n in (1, 500):
        out = tmp_path_factory.mktemp(f"mapped{n}")
        (record,) = map_queries(atlas.model, atlas.query, out, batch_key="batch", **SETTINGS).queries
        found[str(n)] = write_report(job_of(atlas.model, out), crowd(record, n) if n > 1 else [record], 1.0)
    hostile = {"hostile": 1, "many hostile": UNFOLDED}
    return {**found, **{name: hostile_report(atlas, tmp_path_factory.mktemp(name), n) for name, n in hostile.items()}}


def opened(page: Page, path: Path, anchor: str = "") -> float:
    """Open a report as a reader would; the seconds that it took."""
    page.dark(False)
    page.complaints.clear()
    page.requests.clear()
    return page.open(path, anchor)


def test_cells_are_drawn_and_nothing_is_asked_for(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["1"], "#q-0")
    page.until(DRAWN)
    assert page.run(COLOURS) > 20
    assert page.run("document.querySelectorAll('.charts path').length") >= 6
    light = page.run("getComputedStyle(document.body).backgroundColor")
    before = page.run("document.querySelector('.picture canvas').toDataURL()")
    page.dark(True)
    page.until(f"document.querySelector('.picture canvas').toDataURL() !== {before!r}")
    assert page.run("getComputedStyle(document.body).backgroundColor") != light
    assert page.complaints == []
    assert page.requests == [reports["1"].as_uri() + "#q-0"] or page.requests == [reports["1"].as_uri()]


def test_pointing_at_a_cell_tells_its_label(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["1"], "#q-0")
    page.until(DRAWN)
    page.point(*page.run(SPOT))
    page.until("!document.getElementById('tip').hidden")
    told = page.run("document.getElementById('tip').innerText")
    shown = page.run("[...document.querySelectorAll('.legend button')].map(b => b.textContent)")
    assert told.split("\n")[0] in shown
    assert "uncertainty 0." in told
    assert "distance" in told
    page.point(1, 1)
    page.until("document.getElementById('tip').hidden")


def test_colours_show_label_uncertainty_or_distance(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["1"], "#q-0")
    page.until(DRAWN)
    pictures = {page.run("document.querySelector('.picture canvas').toDataURL()")}
    ways = page.run("[...document.querySelectorAll('.picture .switch button')].map(b => b.textContent)")
    assert ways == ["label", "Uncertainty", "Distance"]
    for i, way in list(enumerate(ways))[1:]:
        page.run(f"document.querySelectorAll('.picture .switch button')[{i}].click()")
        page.until("document.querySelector('.legend .ramp') !== null")
        page.until(f"!{sorted(pictures)!r}.includes(document.querySelector('.picture canvas').toDataURL())")
        pictures.add(page.run("document.querySelector('.picture canvas').toDataURL()"))
        assert page.run("document.querySelector('.picture .switch [aria-pressed=true]').textContent") == way
    assert len(pictures) == 3
    assert page.complaints == []


def test_five_hundred_open_at_once_and_are_sorted_and_filtered(page: Page, reports: dict[str, Path]) -> None:
    assert opened(page, reports["500"], "#sort=beyond-down") < 10  # 1 s where nothing else runs
    assert page.run("document.querySelectorAll('canvas').length") == 0
    assert page.run(NAMES)[:3] == ["patient 499", "patient 498", "patient 497"]
    assert page.run("document.querySelector('details.query').dataset.number") == "499"
    page.run("document.querySelector('th[data-key=name] button').click()")
    assert page.run(NAMES)[:3] == ["patient 0", "patient 1", "patient 2"]
    page.run("const f = document.getElementById('filter'); f.value = 'Patient 49'; f.dispatchEvent(new Event('input'))")
    assert len(page.run(NAMES)) == 11
    assert page.run("document.getElementById('count').textContent") == "11 of 500 shown"
    page.run("document.getElementById('as-pictures').click()")
    page.until(DRAWN)
    assert page.run("document.querySelectorAll('.tile:not([hidden]) canvas').length") == 11
    assert page.complaints == []


@pytest.mark.parametrize("which", ["500", "many hostile"])
def test_a_folded_section_is_what_a_reader_without_scripts_has(
    which: str, page: Page, reports: dict[str, Path]
) -> None:
    body = """(() => {
      const copy = document.querySelector("#q-3 .body").cloneNode(true);
      copy.querySelector(".picture").replaceChildren();
      return copy.outerHTML;
    })()"""
    page.scripts(False)
    try:
        opened(page, reports[which])
        plain = page.run(body)
    finally:
        page.scripts(True)
    opened(page, reports[which])
    assert page.run("document.querySelector('#q-3 .body')") is None
    page.run("document.querySelector('#q-3 summary').click()")
    page.until("document.querySelector('#q-3 .body') !== null")
    assert page.run(body) == plain
    page.run("document.getElementById('q-3').scrollIntoView()")
    page.until("document.querySelector('#q-3 canvas[width]') !== null")
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.complaints == []


def test_hostile_text_stays_text(page: Page, reports: dict[str, Path]) -> None:
    opened(page, reports["hostile"], "#q-0")
    page.until(DRAWN)
    page.run("document.getElementById('as-pictures').click()")
    page.until("document.querySelectorAll('.tile').length === 2")
    page.run("scrollTo(0, document.querySelector('.picture canvas').getBoundingClientRect().top + scrollY - 60)")
    page.point(*page.run(SPOT))
    page.until("!document.getElementById('tip').hidden")
    assert page.run("document.title") == "scarcade: 1 of 2 queries mapped"
    assert page.run("document.querySelectorAll('img, body b:not(.legend-text b):not(#tip b):not(.tile b)').length") == 0
    text = page.run("document.querySelector('main').textContent + document.querySelector('.legend').textContent")
    assert short(HOSTILE) in text
    assert page.complaints == []
    assert len(page.requests) == 1


def test_the_policy_of_the_page_stops_what_it_must(page: Page, reports: dict[str, Path]) -> None:
    """Were there a way in, it would lead nowhere; and this test's eyes are open."""
    opened(page, reports["1"])
    page.run("const s = document.createElement('img'); s.src = 'http://127.0.0.1:9/x.png'; document.body.append(s)")
    assert page.run("fetch('http://127.0.0.1:9/').then(() => 'let', () => 'stopped')") == "stopped"
    for way in (
        "document.body.insertAdjacentHTML('beforeend', '<i></i>')",
        "document.body.setAttribute('onclick', 'document.title = 1')",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))",
        "eval('document.title = 1')",
    ):
        assert page.run(f"try {{ {way}; 'let' }} catch {{ 'stopped' }}") == "stopped", way
    assert page.run("document.title") == "scarcade: 1 of 1 queries mapped"
    assert any("Content Security Policy" in one for one in page.complaints)


def test_without_its_script_the_page_can_be_read(page: Page, reports: dict[str, Path]) -> None:
    page.scripts(False)
    try:
        opened(page, reports["1"])
        assert page.run("document.querySelector('noscript p').textContent").startswith("Scripts are off")
        assert page.run("document.getElementById('toolbar').hidden")
        assert page.run("document.querySelectorAll('.composition tbody tr').length") >= 2
        assert page.run("document.querySelectorAll('.charts path.bars').length") >= 2
    finally:
        page.scripts(True)
