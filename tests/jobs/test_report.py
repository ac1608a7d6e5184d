"""The report: one page without a network, labels escaped, opened in a real browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import anndata as ad
import pytest

from scarcade.jobs.mapping import map_queries
from scarcade.jobs.report import bars, short
from tests.jobs.conftest import Atlas, train_on

HOSTILE = '<script>document.title="hacked"</script><img src=x onerror=alert(1)>$x_1$ {{ 7*7 }}'


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def hostile(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of one good query, one bad one, and labels, batches and names that would like to be programs."""
    from dataclasses import replace

    from scarcade.engine.contracts import Categories

    folder = tmp_path_factory.mktemp("hostile")
    labels = atlas.store.schema.labels[0]
    evil = Categories("label", (HOSTILE, "x" * 1_000_000, *labels.values[2:]))
    cells = atlas.store.to_anndata(["batch0", "batch1"])
    cells.obs["label"] = cells.obs["label"].astype(str).map(dict(zip(labels.values, evil.values, strict=True)))
    cells.obs["batch"] = cells.obs["batch"].astype(str)

    class Store:
        schema = replace(atlas.store.schema, labels=(evil,))
        fingerprint = atlas.store.fingerprint

    model = train_on(cells, Store(), folder / "model", epochs=3)  # type: ignore[arg-type]
    query = ad.read_h5ad(atlas.query)
    queries = {"<b>bold</b> & co": query, "broken": ad.AnnData(query.X[:, :1])}
    map_queries(model, queries, folder / "out", batch_key=None, epochs=2, report={"picture": "pca"})
    return folder / "out" / "report.html"


def test_nothing_in_the_page_is_fetched_or_run(hostile: Path) -> None:
    tags = Tags(hostile.read_text()).found
    assert not {tag for tag, _ in tags} & {"script", "iframe", "object", "embed", "link", "base", "form", "b"}
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), value[:80]


def test_hostile_labels_are_shown_as_what_they_are(hostile: Path) -> None:
    page = hostile.read_text()
    assert html.escape(HOSTILE)[:60] in page.replace("&#34;", "&quot;")
    assert "{{ 7*7 }}" in html.unescape(page) or short(HOSTILE) in html.unescape(page)
    assert "x" * 1000 not in page
    assert len(page) < 2_000_000


def test_states_and_reasons_are_in_the_table(hostile: Path) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", hostile.read_text()))
    summary = json.loads((hostile.parent / "summary.json").read_text())
    for query in summary["queries"]:
        assert query["state"] in text
    (failed,) = [query for query in summary["queries"] if query["state"] == "failed"]
    assert failed["reason"] in text


def test_a_csv_cell_is_no_formula(atlas: Atlas, tmp_path: Path) -> None:
    query = ad.read_h5ad(atlas.query)
    map_queries(atlas.model, {"=cmd|' /C calc'!A0": query}, tmp_path, epochs=1, report={"picture": "pca"})
    line = (tmp_path / "summary.csv").read_text().splitlines()[1]
    assert line.startswith("'=cmd")


def test_a_browser_opens_it(hostile: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a headless Chromium, which is not on this machine")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=2000", "--dump-dom", hostile.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>scarcade: 1 of 2 queries mapped</title>" in done.stdout
    assert done.stdout.count("data:image/png") == 2


def test_bars_are_the_largest_first_and_the_rest_is_summed_up() -> None:
    assert bars({"a": 1, "b": 4}) == [("b", 4, 100.0), ("a", 1, 25.0)]
    many = bars({str(i): 10 for i in range(30)}, most=5)
    assert many[-1][:2] == ("26 more", 260)


def test_a_long_label_is_cut() -> None:
    assert len(short("y" * 500)) == 80
    assert short("CD4 T") == "CD4 T"
