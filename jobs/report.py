"""``report.html`` of a mapping: one file that needs no network, made from the records of the queries.

Every value that comes from a file is escaped, in the HTML and in the JSON that the page's script draws from. A content
security policy allows the one style and the one script of the page, each by its hash, and nothing else: whatever a
label may hold, it cannot run and nothing is fetched. Tables, bars, histograms and curves are plain HTML and SVG, so a
page without its script lacks the pictures of cells and the sorting, and nothing more. Queries are rendered one after
the other: a report of many needs the memory of one, and a few milliseconds for each.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from scarcade import __version__
from scarcade.engine.errors import StorageError
from scarcade.jobs.console import seconds
from scarcade.jobs.query_task import Job, MapConfig
from scarcade.jobs.reference import Reference
from scarcade.jobs.report_charts import HEIGHT, SHAPES, WIDTH
from scarcade.jobs.report_data import details, island, looks_of, row, shared
from scarcade.jobs.report_words import percent, short
from scarcade.jobs.results import Record

SCRIPTS = ("report_cells.js", "report_picture.js", "report_table.js")  # one script in the page, in this order
OPEN = 3  # a report of so few queries shows them all at once


def write_report(job: Job, records: Sequence[Record], took: float) -> Path:
    """Write ``report.html`` of a mapping that took `took` seconds.

    Raises:
        StorageError: it cannot be written.
    """
    path = job.results.out / "report.html"
    temporary = job.results.out / ".tmp-report.html"
    try:
        # A name may hold half a character (a file name that is not UTF-8); it must not cost the report.
        with open(temporary, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(_page(job, records, took))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _page(job: Job, records: Sequence[Record], took: float) -> Any:
    folder = Path(__file__).parent
    style = (folder / "report.css").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    # Line breaks between tags would be a third of what the browser has to keep of the page.
    template = re.sub(r"(?<=[>}])\s*\n\s*(?=[<{])", "", (folder / "report.html").read_text(encoding="utf-8"))
    environment = jinja2.Environment(autoescape=True)
    environment.filters |= {
        "short": short,
        "percent": lambda value: "" if value is None else percent(value),
        "seconds": lambda value: "" if value is None else seconds(value),
        "thousands": lambda value: "" if value is None else f"{value:,}",
    }
    looks = looks_of(job.reference)
    rows = [row(number, record) for number, record in enumerate(records)]
    return environment.from_string(template).stream(
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script),
        summary=summary(rows, took),
        reference=about(job.reference),
        settings=settings(job.config),
        rows=rows,
        shared=island(shared(job.reference, job.projection, looks)),
        details=lambda number: details(job, records[number], looks),
        open=len(records) <= OPEN,
        chart=(WIDTH, HEIGHT),
        shapes=SHAPES,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )


def policy(style: str, script: str) -> str:
    """The content security policy of a page with this style and this script."""

    def hashed(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{hashed(style)}'; script-src 'sha256-{hashed(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
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
