"""What the report shows of each query and of the reference: from records to plain values, before any HTML."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scarcade.jobs.page import island
from scarcade.jobs.picture import COLUMNS, FARTHEST, in_frame, label_codes, placed_again, words_of
from scarcade.jobs.projection import Projection
from scarcade.jobs.query_task import Job
from scarcade.jobs.reference import Reference
from scarcade.jobs.report_charts import SHAPES, bars, curves, histogram
from scarcade.jobs.report_words import level, sentence, short
from scarcade.jobs.results import Record

COLOURS = 12  # of marks in the page; with five shapes sixty labels look different
EDGE = 10  # bars of the histogram of distances (30, up to 3) that lie within the reference
_SHOWN = 5  # new values of a column
Looks = Mapping[str, Sequence[tuple[int, int]]]
"""Label column -> (colour, shape) of each label, by code."""


def row(number: int, record: Record) -> dict[str, Any]:
    """The line of a query in the overview; `number` is its place among all. What is not known is None."""
    labels: Mapping[str, Any] = record.get("labels") or {}
    scored = next((name for name, found in labels.items() if found.get("accuracy") is not None), None)
    first: Mapping[str, Any] = next(iter(labels.values()), {})
    n, found, wanted = record.get("n_cells"), record.get("genes_found"), record.get("genes_wanted")
    return {
        "number": number,
        "name": record["name"],
        "state": record["state"],
        "reason": record.get("reason"),
        "cells": n,
        "found": found,
        "wanted": wanted,
        "genes": found / wanted if found is not None and wanted else None,
        "uncertainty": first.get("uncertainty"),
        "beyond": record.get("beyond"),
        "level": level(n, record.get("beyond")),
        "sentence": sentence(n, record.get("beyond")),
        "accuracy": labels[scored]["accuracy"] if scored is not None else None,
        "scored": scored,
        "seconds": record.get("seconds"),
        "warnings": record.get("warnings") or [],
    }


def looks_of(reference: Reference) -> Looks:
    """(colour, shape) of every label of every label column; the commonest labels of the reference differ most."""
    found = {}
    for column in reference.schema.labels:
        held = reference.latent.column(column.name) if reference.latent else None
        counts = np.zeros(len(column), np.int64)
        if held is not None:
            counts = np.bincount(held[1][held[1] >= 0], minlength=len(column))
        ranks = np.empty(len(column), np.int64)
        ranks[np.argsort(-counts, kind="stable")] = np.arange(len(column))
        found[column.name] = [(int(r) % COLOURS, int(r) // COLOURS % len(SHAPES)) for r in ranks]
    return found


def shared(reference: Reference, projection: Projection | None, looks: Looks) -> dict[str, Any]:
    """What all pictures share: the looks of the labels, and the reference's cells where it carries their latent."""
    labels = reference.schema.labels[:COLUMNS]
    cells = None
    if projection is not None and reference.latent is not None:
        held = [reference.latent.column(column.name) for column in labels]
        cells = {
            "n": len(projection.points),
            "points": words_of(in_frame(projection.points, projection)),
            "labels": [None if one is None else label_codes(one[1][projection.sample], len(one[0])) for one in held],
        }
    return {
        "columns": [
            {"name": short(one.name), "values": [short(v) for v in one.values], "marks": looks[one.name]}
            for one in labels
        ],
        "axes": None if projection is None else projection.axes,
        "farthest": FARTHEST,
        "reference": cells,
    }


def details(job: Job, record: Record, looks: Looks) -> dict[str, Any]:
    """What the section of a query that is done shows besides its `row`."""
    cells = drawn(job, record)
    labels = {
        name: {
            **found,
            "bars": _bars(job.reference, name, found, looks),
            "path": histogram(found["uncertainty_histogram"]),
        }
        for name, found in (record.get("labels") or {}).items()
    }
    distances = record.get("distance_histogram") or []
    return {
        "record": record,
        "new": {name: _some(values) for name, values in (record.get("new") or {}).items()},
        "labels": labels,
        "curves": curves(record.get("history") or []),
        "within": histogram(distances, 0, EDGE),
        "without": histogram(distances, EDGE),
        "cells": None if cells is None else island(_for_page(cells, job.reference)),
        "outside": 0 if cells is None else cells["outside"],
    }


def drawn(job: Job, record: Record) -> dict[str, Any] | None:
    """The picture of a query in the frame that the report has now, or None where there is none."""
    cells: dict[str, Any] | None = record.get("picture")
    if job.projection is None or not record.get("n_cells"):
        return None
    if cells is not None and cells["frame"] == job.projection.frame:
        return cells
    model = job.reference.model
    return placed_again(
        cells or {"labels": {}, "uncertainty": {}, "distance": None},
        job.results.out / (record.get("result") or f"{record['name']}.h5ad"),
        model.obsm_key,
        model.n_latent,
        record["n_cells"],
        job.projection,
        job.config.seed,
    )


def _some(values: Sequence[str]) -> str:
    """The first values, and how many more there are."""
    more = f", ... ({len(values) - _SHOWN} more)" if len(values) > _SHOWN else ""
    return ", ".join(short(value) for value in values[:_SHOWN]) + more


def _for_page(cells: Mapping[str, Any], reference: Reference) -> dict[str, Any]:
    """A record's picture as the page's script reads it: columns in the reference's order, without their names."""
    names = [column.name for column in reference.schema.labels[:COLUMNS]]
    return {
        "n": cells["n"],
        "points": cells["points"],
        "labels": [cells["labels"].get(name) for name in names],
        "uncertainty": [cells["uncertainty"].get(name) for name in names],
        "distance": cells["distance"],
    }


def _bars(reference: Reference, name: str, found: Mapping[str, Any], looks: Looks) -> list[dict[str, Any]]:
    codes = next(column.codes() for column in reference.schema.labels if column.name == name)
    total = max(1, sum(found["composition"].values()))
    return [
        {
            "label": None if label is None else short(label),
            "mark": None if label is None else looks[name][codes[label]],
            "n": n,
            "share": n / total,
            "beyond": far,
            "lengths": (inside, outside),
        }
        for label, n, far, inside, outside in bars(found["composition"], found.get("beyond") or {})
    ]
