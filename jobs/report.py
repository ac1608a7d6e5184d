"""``report.html`` of a mapping: one page that needs no network and no program, made from the records of the queries.

Every value that comes from a file is escaped; pictures stand in the page as PNG. Queries are rendered one after the
other, so a report of many needs the memory of one.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scarcade import __version__
from scarcade.engine.errors import StorageError
from scarcade.jobs.console import seconds
from scarcade.jobs.one_query import Reference
from scarcade.jobs.projection import Projection
from scarcade.jobs.results import Record, Results

INK, FAINT, ACCENT = "#1d2733", "#c9d1da", "#c2410c"
PALETTE = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#17becf", "#9c755f", "#edc948", "#d37295", "#2f4b7c",
    "#86bcb6", "#8cd17d", "#79706e", "#fabfd2", "#499894", "#ffbe7d", "#a0cbe8", "#b6992d", "#d4a6c8", "#ff9d9a",
)  # fmt: skip
LIMIT_LABEL = 80  # characters of a label that are shown


def write_report(
    results: Results, reference: Reference, records: Sequence[Record], projection: Projection | None
) -> Path:
    """Write ``report.html``.

    Raises:
        StorageError: it cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = short
    environment.filters["percent"] = lambda value: "" if value is None else f"{100 * value:.1f} %"
    environment.filters["seconds"] = lambda value: "" if value is None else seconds(value)
    environment.filters["thousands"] = lambda value: "" if value is None else f"{value:,}"
    path = results.out / "report.html"
    temporary = results.out / ".tmp-report.html"
    stream = environment.get_template("report.html").stream(
        summary=summary(records),
        rows=records,
        details=details(reference, records, projection),
        reference=about(reference),
        labels=[column.name for column in reference.schema.labels],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(stream)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def short(value: Any) -> str:
    """A label that does not break the page, however long it is; whoever hovers sees no more either."""
    text = str(value)
    return text if len(text) <= LIMIT_LABEL else f"{text[: LIMIT_LABEL - 1]}…"


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """What stands at the top."""
    states = [record["state"] for record in records]
    return {
        "n": len(records),
        "done": states.count("done"),
        "failed": states.count("failed"),
        "skipped": states.count("skipped"),
        "cells": sum(record.get("n_cells") or 0 for record in records),
    }


def about(reference: Reference) -> dict[str, Any]:
    """The reference in a few words."""
    schema = reference.schema
    return {
        "model": reference.model.name,
        "fingerprint": reference.fingerprint,
        "path": str(reference.path),
        "genes": schema.n_genes,
        "batches": len(schema.batch),
        "cells": len(reference.latent) if reference.latent else None,
        "labels": [(column.name, len(column)) for column in schema.labels],
        "notice": reference.model.surgery_notice,
    }


def details(reference: Reference, records: Sequence[Record], projection: Projection | None) -> Iterator[dict[str, Any]]:
    """What the page shows of each query that is done."""
    values = reference.schema.labels[0].values if reference.schema.labels else ()
    for number, record in enumerate(records):
        if record["state"] != "done":
            continue
        yield {
            **record,
            "anchor": f"query-{number}",
            "place": place(record, values, projection) if projection is not None and record.get("points") else None,
            "legend": legend(record, values),
            "bars": {name: bars(found["composition"]) for name, found in (record.get("labels") or {}).items()},
            "curves": curves(record),
        }


def legend(record: Record, values: Sequence[str]) -> list[tuple[str, str]]:
    """(label, colour) of the labels that the picture shows."""
    return [(values[code], PALETTE[code % len(PALETTE)]) for code in sorted(set(record.get("shown") or []))]


def bars(composition: Mapping[str, int], most: int = 15) -> list[tuple[str, int, float]]:
    """(label, cells, share of the largest in %), the largest first; beyond `most` they are summed up."""
    ordered = sorted(composition.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) > most:
        rest = ordered[most - 1 :]
        ordered = [*ordered[: most - 1], (f"{len(rest)} more", sum(n for _, n in rest))]
    top = max((n for _, n in ordered), default=1)
    return [(label, n, 100 * n / top) for label, n in ordered]


def place(record: Record, values: Sequence[str], projection: Projection) -> str:
    """The reference in grey, the query's cells on it, coloured by their predicted label; PNG in base64."""
    figure, axes = _canvas(4.6, 4.0)
    axes.scatter(projection.points[:, 0], projection.points[:, 1], s=3, c=FAINT, linewidths=0, rasterized=True)
    points = np.asarray(record["points"], float).reshape(-1, 2)
    codes = record.get("shown") or []
    colours = [PALETTE[code % len(PALETTE)] for code in codes] if codes else ACCENT
    axes.scatter(points[:, 0], points[:, 1], s=7, c=colours, linewidths=0, alpha=0.85, rasterized=True)
    axes.set_xlabel(record.get("axes", projection.axes)[0])
    axes.set_ylabel(record.get("axes", projection.axes)[1])
    axes.set_xticks([])
    axes.set_yticks([])
    return _png(figure)


def curves(record: Record) -> str | None:
    """Training curve, uncertainty and distance side by side; PNG in base64."""
    labels = list((record.get("labels") or {}).items())
    panels = [bool(record.get("history")), bool(labels), "distance_histogram" in record]
    if not any(panels):
        return None
    figure = Figure(figsize=(2.6 * sum(panels), 2.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(np.atleast_1d(figure.subplots(1, sum(panels))))
    if panels[0]:
        _curve(next(axes), record["history"])
    if panels[1]:
        name, found = labels[0]
        _histogram(next(axes), found["uncertainty_histogram"], 1.0, f"uncertainty of {short(name)[:24]}")
    if panels[2]:
        _histogram(next(axes), record["distance_histogram"], 3.0, "distance (1: edge of reference)", mark=1.0)
    return _png(figure)


def _curve(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    for name, colour in (("train/elbo", INK), ("validation/elbo", ACCENT)):
        points = [(line["epoch"] + 1, line[name]) for line in history if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.3, label=name)
    _plain(axes, "negative ELBO by epoch")


def _histogram(axes: Axes, counts: Sequence[int], top: float, title: str, mark: float | None = None) -> None:
    width = top / len(counts)
    axes.bar(np.arange(len(counts)) * width, counts, width=width, align="edge", color="#64748b")
    if mark is not None:
        axes.axvline(mark, color=ACCENT, lw=1)
    axes.set_yticks([])
    _plain(axes, title)


def _plain(axes: Axes, title: str) -> None:
    # A title is text and never mathematics: "$" in a label must not be typeset.
    axes.set_title(title, fontsize=8, color=INK, parse_math=False)
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for side in axes.spines.values():
        side.set_color(FAINT)
    return figure, axes


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return base64.b64encode(buffer.getvalue()).decode()
