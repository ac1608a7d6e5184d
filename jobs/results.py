"""What a mapping leaves behind for each query: NAME.h5ad, NAME.delta/ and a record; and the summary over all.

Each is written under another name and renamed, the record last: a query is done exactly if its record is there with
the key of the same query, reference and settings. So the same command again maps what is not done, after any kill.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scarcade import __version__
from scarcade.dataloaders.schema import Query
from scarcade.engine.errors import StorageError
from scarcade.engine.folder import sync, write_bytes, write_json
from scarcade.jobs.one_query import Mapped, Reference
from scarcade.jobs.queries import Task
from scarcade.jobs.storable import storable
from scarcade.jobs.zarr_copy import zarr_to_h5ad
from scarcade.models.saved import save_delta

RECORDS = ".records"
DISTANCE = "reference_distance"
SUMMARY_FIELDS = ("name", "path", "state", "reason", "n_cells", "genes_found", "genes_wanted", "seconds")
Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The folder of the results."""

    out: Path

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
        return (self.out / f"{name}.h5ad").is_file() and (self.out / f"{name}.delta" / "MANIFEST.json").is_file()

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
        """NAME.delta/ and NAME.h5ad, each complete or not at all.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        self.forget(task.name)
        save_delta(
            mapped.model,
            self.out / f"{task.name}.delta",
            parent=reference.fingerprint,
            training={"steps": mapped.steps, "history": mapped.history[-1:], **provenance},
            replace=True,
        )
        path = self.out / f"{task.name}.h5ad"
        temporary = self.out / f".tmp-{task.name}-{os.getpid()}.h5ad"
        try:
            write_h5ad(temporary, task, query, mapped, provenance)
            sync(temporary)
            os.replace(temporary, path)
            sync(self.out)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    def write_summary(self, reference: str, records: Sequence[Record]) -> None:
        """summary.json and summary.csv."""
        rows = [_row(record) for record in records]
        write_json(self.out / "summary.json", {"reference": reference, "queries": rows})
        write_bytes(self.out / "summary.csv", csv_of(rows).encode())


def write_h5ad(path: Path, task: Task, query: Query, mapped: Mapped, provenance: Mapping[str, Any]) -> None:
    """The query's file with what was found: obsm, obs and uns["scarcade"] are added, everything else stays."""
    import anndata as ad
    import h5py

    obs = annotated(query, mapped)
    source = Path(task.source) if isinstance(task.source, str | Path) else None
    if source is None:
        task.source.write_h5ad(path)
    elif source.is_file():
        shutil.copyfile(source, path)
    else:
        zarr_to_h5ad(source, path)
    with h5py.File(path, "r+") as file:
        del file["obs"]
        ad.io.write_elem(file, "obs", obs)
        for name in ("obsm", "uns"):
            if name not in file:
                ad.io.write_elem(file, name, {})
        for name, value in (
            (mapped.model.obsm_key, mapped.mean),
            (f"{mapped.model.obsm_key}_variance", mapped.variance),
        ):
            ad.io.write_elem(file["obsm"], name, value)
        if mapped.classified is not None:
            one = mapped.classified
            table = pd.DataFrame(one.probabilities, index=obs.index, columns=list(one.column.values))
            ad.io.write_elem(file["obsm"], f"{one.column.name}_{one.by}", table)
        ad.io.write_elem(file["uns"], "scarcade", {"mapping": json.dumps(dict(provenance), sort_keys=True)})


def annotated(query: Query, mapped: Mapped) -> pd.DataFrame:
    """The query's obs with ``<label>_pred`` and ``<label>_uncertainty`` of every label, and ``reference_distance``.

    Where the model has a classifier, what it says of the primary label is in ``<label>_<model>``.
    """
    obs = storable(query.obs)
    for prediction in mapped.predictions:
        values = pd.Categorical.from_codes(prediction.codes, categories=pd.Index(prediction.column.values))
        obs[f"{prediction.column.name}_pred"] = values
        obs[f"{prediction.column.name}_uncertainty"] = prediction.uncertainty
    if mapped.classified is not None:
        one = mapped.classified
        values = pd.Categorical.from_codes(one.codes, categories=pd.Index(one.column.values))
        obs[f"{one.column.name}_{one.by}"] = values
    if mapped.distance is not None:
        obs[DISTANCE] = mapped.distance
    return obs


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
