"""One query as a task: read, map, commit, and a record of what came of it, also when it fails.

A record is JSON: what the summary and the report show, and the key by which the same command knows what is done.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from scarcade.dataloaders.query_counts import Keep, keep_for_mapping, seen
from scarcade.dataloaders.schema import Query, read_query
from scarcade.dataloaders.scratch import Scratch
from scarcade.engine.config import Section
from scarcade.engine.contracts import Schema
from scarcade.engine.errors import ScarcadeError
from scarcade.engine.launch import Scale
from scarcade.engine.scores import label_accuracy
from scarcade.jobs.exits import explained
from scarcade.jobs.one_query import (
    Mapped,
    QueryData,
    QueryOptim,
    QuerySurgery,
    Reference,
    TransferConfig,
    known_accuracy,
    map_query,
)
from scarcade.jobs.projection import How, Projection
from scarcade.jobs.queries import Task
from scarcade.jobs.results import Record, Results, histogram, provenance_of

FORMAT = 1  # of records: a result of another format is mapped again
SHOWN = 1_500  # cells of a query that its picture shows
Told = Callable[[str, Mapping[str, Any]], None]
"""Told (name of a query, a line of its training's metrics or {"state": ...})."""


class ReportConfig(Section):
    """What report.html shows."""

    picture: How = Field(
        "pca", description="Where cells are shown: principal components, or umap (slower; needs the extra umap)."
    )


class MapConfig(Section):
    """Everything that decides how queries are mapped."""

    optim: QueryOptim = QueryOptim()
    data: QueryData = QueryData()
    surgery: QuerySurgery = QuerySurgery()
    transfer: TransferConfig = TransferConfig()
    report: ReportConfig = ReportConfig()
    scale: Scale = Scale()
    min_genes: float = Field(0.5, ge=0, le=1, description="Share of the reference's genes that a query must have.")
    unlabelled: tuple[str, ...] = Field((), description="Labels of the queries that mean no label.")
    protein_key: str | None = Field(None, description="Entry of obsm with the queries' proteins; default: found out.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")

    def decisive(self) -> dict[str, Any]:
        """The settings that a result depends on."""
        return self.model_dump(mode="json", exclude={"scale": True, "report": True, "data": {"stream_above"}})


@dataclass(frozen=True)
class Job:
    """What all queries of a mapping share."""

    reference: Reference
    config: MapConfig
    results: Results
    projection: Projection | None = None  # the frame in which the report shows all of them


def key_of(task: Task, content: str, reference: Reference, config: MapConfig) -> str:
    """Equal exactly for the same query, reference and settings."""
    parts = {
        "format": FORMAT,
        "content": content,
        "name": task.name,
        "reference": reference.fingerprint,
        "latent": reference.latent.about if reference.latent else None,
        "batch_key": task.batch_key,
        "label_keys": task.label_keys,
        "layer": task.layer,
        "settings": config.decisive(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def map_task(job: Job, task: Task, key: str, say: Told) -> Record:
    """Map one query and commit its results; its record, also if it fails."""
    reference, config = job.reference, job.config
    began = time.monotonic()
    scratch = Scratch(job.results.out, task.name)
    try:
        query = read_task(job, task, keep_for_mapping(scratch, limit=config.data.stream_above, seed=config.seed))
        lines: list[Mapping[str, Any]] = []

        def progress(line: Mapping[str, Any]) -> None:
            lines.append(line)
            say(task.name, line)

        mapped = map_query(
            reference,
            query,
            optim=config.optim,
            data=config.data,
            surgery=config.surgery,
            seed=config.seed,
            progress=progress,
        )
        trained = time.monotonic() - began
        n_shared = reference.model.n_latent  # without terms that surgery added
        content = task.content_hash()
        provenance = provenance_of(reference, key, content, query, config.decisive())
        job.results.write(task, query, reference, mapped, provenance)
        record = {
            **_facts(task, query, reference),
            "state": "done",
            "reason": None,
            "key": key,
            "seconds_training": round(trained, 3),
            "new": {name: list(values) for name, values in mapped.new.items()},
            "warnings": list(mapped.notes),
            "labels": _label_facts(reference, query, mapped),
            "history": [_curve_point(line) for line in mapped.history],
            **_distance_facts(mapped.distance),
            **_picture_facts(mapped.mean[:, :n_shared], mapped.predictions, job.projection, config.seed),
            "seconds": round(time.monotonic() - began, 3),
        }
    except Exception as error:  # noqa: BLE001  (one query's failure is told and never stops the others)
        record = failed(task, reference.schema, error, time.monotonic() - began)
    finally:
        scratch.remove()
    job.results.write_record(record)
    return record


def check_task(job: Job, task: Task) -> Query:
    """The cells of a task, checked as `read_task` does, in memory that does not depend on their number.

    Raises:
        InputError: they cannot be used, as `read_query`.
    """
    return read_task(job, task, partial(seen, scratch=Scratch(job.results.out, task.name)))


def read_task(job: Job, task: Task, keep: Keep) -> Query:
    """The checked cells of a task; `keep` says what becomes of their counts.

    Raises:
        InputError: they cannot be used, as `read_query`.
    """
    return read_query(
        task.source,
        job.reference.model.reads,
        batch_key=task.batch_key,
        label_keys=task.label_keys,
        layer=task.layer,
        unlabelled=job.config.unlabelled,
        name=task.name,
        min_genes=job.config.min_genes,
        protein_key=job.config.protein_key,
        keep=keep,
    )


def _facts(task: Task, query: Query, reference: Reference) -> Record:
    return {
        "name": task.name,
        "path": task.path,
        "n_cells": query.n_cells,
        "genes_found": query.alignment.found,
        "genes_wanted": reference.schema.n_genes,
        "counts_from": query.counts_from,
        "batch_key": query.batch_key,
        "n_batches": len(set(query.batch)),
    }


def _label_facts(reference: Reference, query: Query, mapped: Mapped) -> dict[str, Any]:
    predictions, classified = mapped.predictions, mapped.classified
    accuracy = known_accuracy(reference.schema, query, predictions)
    facts = {}
    for prediction in predictions:
        counts = np.bincount(prediction.codes, minlength=len(prediction.column))
        facts[prediction.column.name] = {
            "composition": {v: int(n) for v, n in zip(prediction.column.values, counts, strict=True) if n},
            "uncertainty": round(float(prediction.uncertainty.mean()), 4) if query.n_cells else None,
            "uncertainty_histogram": histogram(prediction.uncertainty, 20, 1.0),
            **{name: round(value, 4) for name, value in accuracy.get(prediction.column.name, {}).items()},
        }
    if classified is not None and classified.column.name in accuracy:
        own = label_accuracy(query.labels[0], classified.codes)
        facts[classified.column.name] |= {f"{classified.by}_{name}": round(value, 4) for name, value in own.items()}
    return facts


def _distance_facts(distance: np.ndarray | None) -> Record:
    """`beyond`: the share of cells that lie farther out than 95 % of the reference's own."""
    if distance is None or not len(distance):
        return {}
    return {
        "beyond": round(float((distance > 1).mean()), 4),
        "distance_median": round(float(np.median(distance)), 4),
        "distance_histogram": histogram(distance, 30, 3.0),
    }


def _picture_facts(mean: np.ndarray, predictions: Sequence[Any], projection: Projection | None, seed: int) -> Record:
    """A sample of the cells in the frame of the report."""
    if projection is None or not len(mean):
        return {}
    rng = np.random.default_rng([seed, 3])
    shown = np.sort(rng.choice(len(mean), SHOWN, replace=False)) if len(mean) > SHOWN else np.arange(len(mean))
    points = projection.of(mean[shown])
    return {
        "points": [[round(float(x), 3), round(float(y), 3)] for x, y in points],
        "axes": list(projection.axes),
        "shown": predictions[0].codes[shown].tolist() if predictions else [],
    }


def _curve_point(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in ("epoch", "train/elbo", "validation/elbo", "train/loss") if name in line}


def failed(task: Task, schema: Schema, error: Exception, seconds: float) -> Record:
    """The record of a query that could not be mapped."""
    code, message = explained(error)
    return {
        "name": task.name,
        "path": task.path,
        "state": "failed",
        "reason": message if isinstance(error, ScarcadeError) else message.splitlines()[0],
        "error": getattr(error, "code", type(error).__name__),
        "exit_code": code,
        "n_cells": None,
        "genes_found": None,
        "genes_wanted": schema.n_genes,
        "seconds": round(seconds, 3),
    }


def skipped(task: Task, schema: Schema) -> Record:
    """The record of a query whose turn did not come."""
    return {
        "name": task.name,
        "path": task.path,
        "state": "skipped",
        "reason": "stopped before its turn; the same command again maps it",
        "n_cells": None,
        "genes_found": None,
        "genes_wanted": schema.n_genes,
        "seconds": 0.0,
    }
