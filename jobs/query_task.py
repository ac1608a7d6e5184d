"""One query as a task: read, map, commit, and a record of what came of it, also when it fails.

A record is JSON: what the summary and the report show, and the key by which the same command knows what is done.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from scarcade.dataloaders.query_counts import Keep, seen
from scarcade.dataloaders.schema import Query, read_query
from scarcade.dataloaders.scratch import Scratch
from scarcade.engine.config import Section
from scarcade.engine.errors import MemoryLimitError, ScarcadeError
from scarcade.engine.memory import ran_out
from scarcade.engine.schema import Schema
from scarcade.engine.scores import label_accuracy
from scarcade.jobs.exits import explained
from scarcade.jobs.map_scale import MapScale, check_memory
from scarcade.jobs.one_query import Mapped, known_accuracy
from scarcade.jobs.picture import picture
from scarcade.jobs.projection import How, Projection
from scarcade.jobs.queries import Task
from scarcade.jobs.query_settings import QueryData, QueryOptim, QuerySurgery
from scarcade.jobs.reference import Reference, TransferConfig
from scarcade.jobs.results import Record, Results, histogram, provenance_of
from scarcade.jobs.written import Format

FORMAT = 2  # of records: a result of another format is mapped again
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
    scale: MapScale = MapScale()
    min_genes: float = Field(0.5, ge=0, le=1, description="Share of the reference's genes that a query must have.")
    unlabelled: tuple[str, ...] = Field((), description="Labels of the queries that mean no label.")
    results: Format = Field("h5ad", description="How results are written: h5ad or zarr.")
    protein_key: str | None = Field(None, description="Entry of obsm with the queries' proteins; default: found out.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")

    def decisive(self) -> dict[str, Any]:
        """The settings that a result depends on."""
        beside: dict[str, Any] = dict.fromkeys(("scale", "report", "results"), True)
        beside["data"] = {"stream_above", "gpu_memory"}
        return self.model_dump(mode="json", exclude=beside)


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


def committed(
    job: Job,
    task: Task,
    key: str,
    query: Query,
    mapped: Mapped,
    *,
    seconds_training: float,
    seconds: Callable[[], float],
) -> Record:
    """Write what became of a query, its record last; `seconds` tells how long the query took until it is asked."""
    reference, config = job.reference, job.config
    n_shared = reference.model.n_latent  # without terms that surgery added
    provenance = provenance_of(reference, key, task.content_hash(), query, config.decisive())
    job.results.write(task, query, reference, mapped, provenance)
    record = {
        **_facts(task, query, reference),
        "state": "done",
        "reason": None,
        "result": job.results.result(task.name).name,
        "key": key,
        "seconds_training": round(seconds_training, 3),
        "new": {name: list(values) for name, values in mapped.new.items()},
        "warnings": list(mapped.notes),
        "labels": _label_facts(reference, query, mapped),
        "history": [_curve_point(line) for line in mapped.history],
        **_distance_facts(mapped.distance),
        **picture(mapped.mean[:, :n_shared], mapped.predictions, mapped.distance, job.projection, config.seed),
        "seconds": round(seconds(), 3),
    }
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
        InputError: they cannot be used, as `read_query`. MemoryLimitError: they are too large for a worker.
    """
    latent = job.reference.latent
    check_memory(
        task.source,
        job.reference.model.reads,
        job.config.scale,
        stream_above=job.config.data.stream_above,
        beside=0
        if latent is None
        else 2 * latent.mean.nbytes,  # as it is searched, for all cells and for labelled ones
    )
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
        where=task.url,
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
        values = prediction.column.values
        facts[prediction.column.name] = {
            "composition": _counted(values, prediction.codes),
            "beyond": {} if mapped.distance is None else _counted(values, prediction.codes[mapped.distance > 1]),
            "uncertainty": round(float(prediction.uncertainty.mean()), 4) if query.n_cells else None,
            "uncertainty_histogram": histogram(prediction.uncertainty, 20, 1.0),
            **{name: round(value, 4) for name, value in accuracy.get(prediction.column.name, {}).items()},
        }
    if classified is not None and classified.column.name in accuracy:
        own = label_accuracy(query.labels[0], classified.codes)
        facts[classified.column.name] |= {f"{classified.by}_{name}": round(value, 4) for name, value in own.items()}
    return facts


def _counted(values: Sequence[str], codes: np.ndarray) -> dict[str, int]:
    return {v: int(n) for v, n in zip(values, np.bincount(codes, minlength=len(values)), strict=True) if n}


def _distance_facts(distance: np.ndarray | None) -> Record:
    """`beyond`: the share of cells that lie farther out than 95 % of the reference's own."""
    if distance is None or not len(distance):
        return {}
    return {
        "beyond": round(float((distance > 1).mean()), 4),
        "distance_median": round(float(np.median(distance)), 4),
        "distance_histogram": histogram(distance, 30, 3.0),
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
        "error": MemoryLimitError.code if ran_out(error) else getattr(error, "code", type(error).__name__),
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
