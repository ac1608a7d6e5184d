"""What a mapping leaves behind for each query: NAME.h5ad (or .zarr), NAME.delta/ and a record; the summary over all.

Each is written under another name and renamed, the record last: a query is done exactly if its record is there with
the key of the same query, reference and settings. So the same command again maps what is not done, after any kill.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scarcade import __version__
from scarcade.dataloaders.schema import Query
from scarcade.engine.folder import write_bytes, write_json
from scarcade.jobs.one_query import Mapped
from scarcade.jobs.queries import Task
from scarcade.jobs.reference import Reference
from scarcade.jobs.written import Format, is_whole, remove, write_result
from scarcade.models.saved import save_delta

RECORDS = ".records"
SUMMARY = "summary.json"
SUMMARY_FIELDS = ("name", "path", "state", "reason", "n_cells", "genes_found", "genes_wanted", "seconds")
Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The folder of the results."""

    out: Path
    format: Format = "h5ad"

    def result(self, name: str) -> Path:
        """Where the result of the query `name` stands."""
        return self.out / f"{name}.{self.format}"

    def record(self, name: str, key: str | None = None) -> Record | None:
        """The record of the query `name`; with `key`, only if it is of that key and its results are there."""
        try:
            record = json.loads((self.out / RECORDS / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict):
            return None
        if key is not None and (record.get("key") != key or record.get("state") != "done" or not self._there(name)):
            return None
        return record

    def _there(self, name: str) -> bool:
        return is_whole(self.result(name)) and (self.out / f"{name}.delta" / "MANIFEST.json").is_file()

    def write_record(self, record: Record) -> None:
        """Put the record of a query in its place."""
        (self.out / RECORDS).mkdir(parents=True, exist_ok=True)
        write_json(self.out / RECORDS / f"{record['name']}.json", record)

    def forget(self, name: str) -> None:
        """Remove the record of a query, before its results are replaced."""
        (self.out / RECORDS / f"{name}.json").unlink(missing_ok=True)

    def write(
        self, task: Task, query: Query, reference: Reference, mapped: Mapped, provenance: Mapping[str, Any]
    ) -> None:
        """NAME.delta/ and the result, each complete or not at all.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        before = self.record(task.name) or {}
        self.forget(task.name)
        save_delta(
            mapped.model,
            self.out / f"{task.name}.delta",
            parent=reference.fingerprint,
            training={"steps": mapped.steps, "history": mapped.history[-1:], **provenance},
            replace=True,
        )
        path = self.result(task.name)
        try:
            write_result(path, task, query, mapped, provenance)
        except BaseException:  # without the result nobody could tell what this is of
            remove(self.out / f"{task.name}.delta")
            raise
        earlier = self.out / f"{task.name}{'.h5ad' if path.suffix == '.zarr' else '.zarr'}"
        if before.get("result") == earlier.name:  # else it is not ours
            remove(earlier)

    def write_summary(self, reference: str, records: Sequence[Record]) -> None:
        """summary.json and summary.csv."""
        rows = [_row(record) for record in records]
        write_json(self.out / SUMMARY, {"reference": reference, "queries": rows})
        write_bytes(self.out / "summary.csv", csv_of(rows).encode())


def provenance_of(
    reference: Reference, key: str, content: str, query: Query, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a result was made from; JSON."""
    return {
        "scarcade_version": __version__,
        "reference": reference.fingerprint,
        "model": reference.model.name,
        "query": query.where,
        "query_hash": content,
        "key": key,
        "counts_from": query.counts_from,
        "genes_found": query.alignment.found,
        "genes_wanted": len(reference.schema.genes),
        "batch_key": query.batch_key,
        "batches": sorted({str(value) for value in query.batch}),
        "unlabelled": sorted({*reference.schema.unlabelled, *settings.get("unlabelled", ())}),
        "settings": dict(settings),
    }


def csv_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV. A cell that a spreadsheet would take for a formula (= + - @ in front) is quoted with '."""
    rows = list(rows)
    head = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([_harmless(row.get(name)) for name in head])
    return file.getvalue()


def _harmless(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    if isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value


def _row(record: Record) -> dict[str, Any]:
    """The line of a query in the summary: the fixed fields first, then what is known besides."""
    row = {name: record.get(name) for name in SUMMARY_FIELDS}
    for name, value in (
        ("result", record.get("result")),
        ("beyond_reference", record.get("beyond")),
        ("seconds_training", record.get("seconds_training")),
    ):
        if value is not None:
            row[name] = value
    for label, found in (record.get("labels") or {}).items():
        scores = ("uncertainty", "accuracy", "macro_f1")
        row |= {f"{label}_{name}": value for name, value in found.items() if name.endswith(scores)}
    row["warnings"] = record.get("warnings") or []
    return row


def histogram(values: np.ndarray, bins: int, top: float) -> list[int]:
    """Counts in equal bins over 0 .. top; what is beyond counts in the last."""
    return [int(n) for n in np.histogram(np.clip(values, 0, top), bins=bins, range=(0, top))[0]]
