"""``report.html`` of a mapping: one file that needs no network, made from the records of the queries.

Tables, bars, histograms and curves are plain HTML and SVG, so a page without its script lacks the pictures of cells and
the sorting, and nothing more. Queries are rendered one after the other: a report of many needs the memory of one, and a
few milliseconds for each. What keeps labels from running: `jobs.page`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scarcade.jobs.page import island, write_page
from scarcade.jobs.query_task import Job, MapConfig
from scarcade.jobs.reference import Reference
from scarcade.jobs.report_charts import HEIGHT, SHAPES, WIDTH
from scarcade.jobs.report_data import details, looks_of, row, shared
from scarcade.jobs.report_words import short
from scarcade.jobs.results import Record

SCRIPTS = ("report_cells.js", "report_picture.js", "report_table.js")  # one script in the page, in this order
OPEN = 3  # a report of so few queries shows them all at once


def write_report(job: Job, records: Sequence[Record], took: float) -> Path:
    """Write ``report.html`` of a mapping that took `took` seconds.

    Raises:
        StorageError: it cannot be written.
    """
    looks = looks_of(job.reference)
    rows = [row(number, record) for number, record in enumerate(records)]
    return write_page(
        job.results.out / "report.html",
        "report.html",
        styles=["report.css"],
        scripts=SCRIPTS,
        summary=summary(rows, took),
        reference=about(job.reference),
        settings=settings(job.config),
        rows=rows,
        shared=island(shared(job.reference, job.projection, looks)),
        details=lambda number: details(job, records[number], looks),
        open=len(records) <= OPEN,
        chart=(WIDTH, HEIGHT),
        shapes=SHAPES,
    )


def summary(rows: Sequence[Mapping[str, Any]], took: float) -> dict[str, Any]:
    """What stands at the top."""
    states = [one["state"] for one in rows]
    far = [(one["number"], one) for one in rows if one["level"] == "far"]
    return {
        "n": len(rows),
        **{state: states.count(state) for state in ("done", "failed", "skipped")},
        "cells": sum(one["cells"] or 0 for one in rows),
        "seconds": took,
        "measured": any(one["level"] for one in rows),
        "far": sorted(far, key=lambda item: -item[1]["beyond"]),
        "lost": [(one["number"], one) for one in rows if one["state"] == "failed"],
    }


def about(reference: Reference) -> dict[str, Any]:
    """The reference in a few words. The model of a run is called after the run."""
    schema, path = reference.schema, reference.path.absolute()
    return {
        "name": path.parent.name if path.name == "model" and path.parent.name else path.name,
        "model": reference.model.name,
        "fingerprint": reference.fingerprint,
        "path": str(reference.path),
        "genes": schema.n_genes,
        "batches": len(schema.batch),
        "cells": len(reference.latent) if reference.latent else None,
        "labels": [(column.name, len(column)) for column in schema.labels],
        "notice": reference.model.surgery_notice,
    }


def settings(config: MapConfig) -> list[tuple[str, str, bool]]:
    """(name, value, whether it differs from the default) of every setting that decides the results."""
    usual = dict(_flat(MapConfig().decisive()))
    return [(name, short(value), usual.get(name) != value) for name, value in _flat(config.decisive())]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in tree.items()
        for pair in (_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)])
    ]
