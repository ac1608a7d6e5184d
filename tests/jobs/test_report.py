"""What the report holds and says, read from its HTML; tests/jobs/test_report_browser.py opens it."""

import html
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scarcade.engine.errors import InputError, StorageError
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.page import island, policy
from scarcade.jobs.projection import project
from scarcade.jobs.queries import Task
from scarcade.jobs.query_task import Job, failed, skipped
from scarcade.jobs.report import write_report
from scarcade.jobs.report_data import details, drawn, looks_of
from scarcade.jobs.report_words import short
from scarcade.jobs.results import Record, Results
from tests.jobs.conftest import Atlas
from tests.jobs.reports import HOSTILE, SETTINGS, crowd, hostile_report, job_of, relabelled


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def seen(path: Path) -> str:
    """The text of a page, without what its script and style say."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", path.read_text(), flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


@pytest.fixture(scope="module")
def hostile(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_report(atlas, tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def mapped(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Record]:
    """A job, and the record of a query that is done."""
    out = tmp_path_factory.mktemp("mapped")
    (record,) = map_queries(atlas.model, atlas.query, out, batch_key="batch", **SETTINGS).queries
    return job_of(atlas.model, out), record


def test_nothing_in_the_page_is_fetched_and_only_its_own_script_runs(hostile: Path) -> None:
    page = hostile.read_text()
    tags = Tags(page)
    assert not {tag for tag, _ in tags.found} & {"img", "iframe", "object", "embed", "link", "base", "form"}
    for tag, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), attributes
    scripts = [attributes for tag, attributes in tags.found if tag == "script"]
    assert [one.get("type") for one in scripts].count(None) == 1
    (told,) = [a["content"] for t, a in tags.found if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    parts = [re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S) for tag in ("style", "script")]
    assert [len(one) for one in parts] == [1, 1]
    assert told == policy(parts[0][0], parts[1][0])
    assert told.startswith("default-src 'none'; ")
    assert "unsafe" not in told


def test_hostile_text_is_shown_as_what_it_is(hostile: Path) -> None:
    page = hostile.read_text()
    text = html.unescape(page)
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert short(HOSTILE) in text
    assert "{{ 7*7 }}" in text
    assert "x" * 1000 not in page
    assert len(page) < 400_000


def test_json_in_the_page_cannot_end_its_element() -> None:
    text = str(island({"a": HOSTILE, "b": [1.5, None]}))
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == {"a": HOSTILE, "b": [1.5, None]}


def test_the_table_tells_states_reasons_and_what_was_mapped_onto_what(mapped: tuple[Job, Record]) -> None:
    job, record = mapped
    task = Task("lost", "lost.h5ad", None, None, None)
    records = [record, failed(task, job.reference.schema, InputError("lost.h5ad: is no file"), 0.2)]
    records.append(skipped(Task("later", "later.h5ad", None, None, None), job.reference.schema))
    text = seen(write_report(job, records, 83.0))
    assert "3 queries on the reference" in text
    assert job.reference.fingerprint in text
    assert "1 min 23 s in all" in text
    assert "1 not reached" in text
    assert "One query could not be mapped" in text
    assert "lost.h5ad: is no file" in text
    assert "optim.epochs 3 not the default" in text
    assert f"{record['n_cells']} cells" in text
    assert f"accuracy {100 * record['labels']['label']['accuracy']:.0f} %" in text
    for label in record["labels"]["label"]["composition"]:
        assert label in text


def test_new_values_that_are_not_shown_are_counted(mapped: tuple[Job, Record]) -> None:
    job, record = mapped
    looks = looks_of(job.reference)
    told = details(job, {**record, "new": {"batch": [f"b{i}" for i in range(7)], "plate": ["p0"]}}, looks)["new"]
    assert told == {"batch": "b0, b1, b2, b3, b4, ... (2 more)", "plate": "p0"}


def test_far_queries_come_first_in_words(mapped: tuple[Job, Record]) -> None:
    job, record = mapped
    far = {**record, "name": "skin", "beyond": 0.62, "n_cells": 1000}
    text = seen(write_report(job, [record, far], 1.0))
    assert "One query holds what the reference does not skin 62 % of its cells lie beyond the reference" in text
    assert (
        "62 % of its cells lie farther out than 95 % of the reference's own: it holds what the reference does not."
        in text
    )


def test_a_report_of_failures_alone_is_a_report(mapped: tuple[Job, Record]) -> None:
    job, _ = mapped
    task = Task("bad", "bad.h5ad", None, None, None)
    text = seen(write_report(job, [failed(task, job.reference.schema, InputError("no counts"), 0.1)], 0.1))
    assert "1 query on the reference" in text
    assert "0 mapped 1 failed" in text


def test_no_query_is_too_odd_for_it(atlas: Atlas, tmp_path: Path) -> None:
    """No cells, one cell, no labels of its own; a long name; names and 300 labels that are not ASCII."""
    values = tuple(f"Größe {i} 細胞" for i in range(300))
    model, cells = relabelled(atlas, tmp_path, values)
    del cells.obs["label"]
    queries = {"one": cells[:1], "none": cells[:0], "γδ T 細胞 \u202etxt": cells[:50], "n" * 5000: cells[:40]}
    result = map_queries(model, {k: v.copy() for k, v in queries.items()}, tmp_path / "out", **SETTINGS)
    assert not result.failed
    text = seen(tmp_path / "out" / "report.html")
    assert "4 queries on the reference" in text
    assert "γδ T 細胞" in text
    assert "It has no cells." in text
    assert "Its one cell" in text
    looks = looks_of(job_of(model, tmp_path / "out").reference)["label"]
    assert len(set(looks)) == 60


def test_a_reference_without_latent_has_a_report_without_pictures(mapped: tuple[Job, Record]) -> None:
    job, record = mapped
    bare = replace(job, reference=replace(job.reference, latent=None, transfer=None), projection=None)
    found = {name: value for name, value in record.items() if not name.startswith(("distance", "beyond", "picture"))}
    text = seen(write_report(bare, [{**found, "labels": {}}], 1.0))
    assert "carries no latent of its own cells" in text
    assert "0 far from the reference" not in text


def test_a_reference_without_labels_has_a_report_without_them(mapped: tuple[Job, Record]) -> None:
    job, record = mapped
    picture = {**record["picture"], "labels": {}, "uncertainty": {}}
    text = seen(write_report(job, [{**record, "labels": {}, "picture": picture}], 1.0))
    assert "predicted" not in text


def test_a_picture_of_another_frame_is_made_again_from_the_result(mapped: tuple[Job, Record]) -> None:
    job, record = mapped
    latent = job.reference.latent
    assert latent is not None
    assert job.projection is not None
    turned = project(latent.mean * [1, 1, 1, 1, 1, 9], "pca")
    assert turned.frame != job.projection.frame
    assert drawn(job, record) == record["picture"]
    other = drawn(replace(job, projection=turned), record)
    assert other is not None
    assert other["frame"] == turned.frame
    assert other["points"] != record["picture"]["points"]
    assert other["labels"] == record["picture"]["labels"]
    back = drawn(job, {**record, "picture": other})
    assert back is not None
    assert back["points"] == record["picture"]["points"]
    gone = replace(job, projection=turned, results=Results(job.results.out / "elsewhere"))
    assert drawn(gone, record) is None


def test_a_hundred_queries_take_ten_milliseconds_each_and_three_megabytes(mapped: tuple[Job, Record]) -> None:
    job, record = mapped
    began = time.process_time()
    path = write_report(job, crowd(record, 100), 1.0)
    assert (time.process_time() - began) / 100 < 0.010
    assert path.stat().st_size < 3_000_000


@pytest.mark.long
def test_it_needs_no_plotting_library() -> None:
    script = "import sys, scarcade.jobs.mapping, scarcade.jobs.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


def test_a_folder_that_is_gone_is_said(mapped: tuple[Job, Record], tmp_path: Path) -> None:
    job, record = mapped
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(replace(job, results=Results(tmp_path / "gone")), [record], 1.0)


def test_a_csv_cell_is_no_formula(atlas: Atlas, tmp_path: Path) -> None:
    query = ad.read_h5ad(atlas.query)
    map_queries(atlas.model, {"=cmd|' /C calc'!A0": query}, tmp_path, epochs=1, report={"picture": "pca"})
    line = (tmp_path / "summary.csv").read_text().splitlines()[1]
    assert line.startswith("'=cmd")


def test_the_commonest_labels_differ_most(mapped: tuple[Job, Record]) -> None:
    job, _ = mapped
    assert job.reference.latent is not None
    held = job.reference.latent.column("label")
    assert held is not None
    first = int(np.bincount(held[1]).argmax())
    assert looks_of(job.reference)["label"][first] == (0, 0)
