"""Maps many queries onto a reference, each on its own: validate, plan, map, commit, summarise.

A query that fails is set aside with its reason and the others go on. What is done stays done: results are committed
one query at a time, and the same call again maps only what is not there yet.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scarcade.engine.config import checked, merged
from scarcade.engine.cores import cores
from scarcade.engine.errors import InputError, PartialError, StorageError, SurroundingsError, UsageError
from scarcade.engine.folder import sweep
from scarcade.engine.lock import sole_writer
from scarcade.engine.storage import is_url, shown
from scarcade.engine.world import use_threads
from scarcade.jobs.fetched import fetched
from scarcade.jobs.lanes import map_in_lanes
from scarcade.jobs.merged import check_merge, write_merged
from scarcade.jobs.own_settings import own_settings
from scarcade.jobs.packs import large_and_small, packs_of
from scarcade.jobs.projection import project
from scarcade.jobs.queries import Task, tasks_of
from scarcade.jobs.query_task import Job, MapConfig, Told, check_task, failed, key_of, skipped
from scarcade.jobs.reference import load_reference
from scarcade.jobs.results import RECORDS, SUMMARY, Record, Results
from scarcade.jobs.results_at import results_at
from scarcade.models.model import AtlasModel
from scarcade.models.surgery import SurgeryConfig, grow


@dataclass(frozen=True)
class MapResult:
    """What `map_queries` returns: the folder and a record of each query, in the order of the queries."""

    out: Path | str  # or its URL
    reference: str
    queries: tuple[Record, ...]
    merged: Path | None = None  # what `merge` wrote

    @property
    def failed(self) -> tuple[Record, ...]:
        return tuple(record for record in self.queries if record["state"] == "failed")

    def raise_if_failed(self) -> None:
        """Raise for what failed, so that a command can end with its exit code.

        Raises:
            PartialError: some queries failed. InputError, SurroundingsError: none could be mapped.
        """
        if not self.failed:
            return
        reasons = "; ".join(f"{record['name']}: {record['reason']}" for record in self.failed[:3])
        more = f" (and {len(self.failed) - 3} more, see summary.csv)" if len(self.failed) > 3 else ""
        text = f"{len(self.failed)} of {len(self.queries)} queries could not be mapped: {reasons}{more}"
        if len(self.failed) < len(self.queries):
            raise PartialError(text)
        raise (SurroundingsError if self.failed[0]["exit_code"] == 5 else InputError)(text)


def map_queries(
    reference: str | Path,
    queries: Any,
    out: str | Path = "mapped",
    *,
    merge: str | Path | None = None,
    batch_key: str | None = None,
    label_key: Sequence[str] | None = None,
    layer: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    told: Told | None = None,
    **settings: Any,
) -> MapResult:
    """Map `queries` onto the model in the folder `reference`, and write results, summary and report to `out`.

    Args:
        reference: folder or URL of the model.
        queries: paths, folders, globs, URLs, tables (.csv, .tsv) or AnnData objects; one, several, or a mapping from
            names to them.
        out: a folder, or a URL: results are written on this machine first, and copied when the mapping ends.
        merge: a .zarr to write reference and queries to together (see `jobs.merged`).
        batch_key: column of obs with the batch of each cell; without it a query is one batch, named after its file.
        label_key: columns of the queries with labels that are known, in the order of the reference's label columns
            (default: columns of the same names). They are for scoring; training does not see them.
        layer: where the counts are: X, raw, or the name of a layer; default: found out.
        epochs, batch_size, workers, threads: short for `settings` of optim, data and scale.
        settings: sections of `MapConfig` as dictionaries: ``optim={"lr": 1e-3}``.
        told: is told how it goes.

    Returns:
        What became of each query. Failures are in it (`MapResult.raise_if_failed`), and raise nothing here.

    Raises:
        UsageError: settings that cannot be meant, or `out` holds the queries. OpenError, ModelFileError: the reference
            cannot be used. StorageError: `out` cannot be written. BusyError: another command is writing to it.
    """
    direct = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "workers": workers, "threads": threads}
    if is_url(out):
        _check_one_machine(str(out), config_of(settings, **direct))
        given = {"merge": merge, "batch_key": batch_key, "label_key": label_key, "layer": layer, "told": told}
        with results_at(out) as local:
            done = map_queries(reference, queries, local, **given, **direct, **settings)  # type: ignore[arg-type]
        return replace(done, out=str(out))
    began = time.monotonic()
    config = config_of(settings, **direct)
    tasks = tasks_of(queries, batch_key=batch_key, label_keys=label_key, layer=layer)
    loaded = load_reference(reference, config.transfer, seed=config.seed)
    config = config_of(_for_model(settings, loaded.model), **direct)
    _check(config, loaded.model)
    if merge is not None:
        check_merge(Path(merge), loaded, [task.name for task in tasks], Path(out))
    _check_out(Path(out), tasks, loaded.path)
    with _sole_user(Path(out)):
        projection = None
        if loaded.latent is not None and len(loaded.latent):
            projection = project(loaded.latent.mean, config.report.picture, seed=config.seed)
        job = Job(loaded, config, Results(Path(out), config.results), projection)
        ordered = _all_mapped(job, tasks, told or (lambda name, line: None))
        from scarcade.jobs.report import write_report  # which loads jinja2

        write_report(job, ordered, time.monotonic() - began)
    together = None
    if merge is not None and any(record["state"] == "done" for record in ordered):
        together = write_merged(Path(merge), loaded, job.results, ordered)
    return MapResult(job.results.out, loaded.fingerprint, tuple(ordered), together)


def _all_mapped(job: Job, tasks: Sequence[Task], say: Told) -> list[Record]:
    """The records of all queries, in their order; the summary is written whatever happens."""
    records: dict[str, Record] = {}
    try:
        valid = _validated(job, tasks, records, say)
        for name, record in _mapped(job, [task for task in tasks if task.name in valid], valid, say):
            records[name] = record
            found = {"warnings": record["warnings"]} if record.get("warnings") else {}
            say(name, {"state": record["state"], "reason": record.get("reason"), **found})
    finally:  # also when it is stopped: what is done is told
        ordered = [records.get(task.name) or skipped(task, job.reference.schema) for task in tasks]
        job.results.write_summary(job.reference.fingerprint, ordered)
    return ordered


def _for_model(settings: Mapping[str, Any], model: AtlasModel) -> dict[str, Any]:
    """`settings`, before them what the model does by default, and in them programs instead of .gmt files."""
    given = merged(model.query_defaults(), settings)
    surgery = given.get("surgery")
    if isinstance(surgery, Mapping) and isinstance(surgery.get("model"), Mapping):
        own = own_settings(type(model), surgery["model"], model.schema.genes, "surgery.model")
        given["surgery"] = {**surgery, "model": own}
    return given


def _check(config: MapConfig, model: AtlasModel) -> None:
    """Refuse what no query could have, before any is read.

    Raises:
        UsageError: the model learns nothing from labels, or is not to, and settings are about them; it cannot add what
            `surgery.model` asks for. A GPU is asked for.
    """
    if config.data.edit_labels:
        raise UsageError("--data.edit-labels: is for training; in a mapping it is --transfer.edit")
    if config.data.samples_per_label is not None and not config.surgery.use_labels:
        raise UsageError(
            f"--data.samples-per-label {config.data.samples_per_label}: no label of a query is learnt without "
            "--surgery.use-labels; leave it out"
        )
    if (config.optim.early_stopping or config.optim.plateau) and not config.data.validation:
        raise UsageError(
            "--optim.early-stopping and --optim.plateau watch cells that are held out, and --data.validation is 0: "
            "give a share of each query's cells, such as 0.1"
        )
    if config.surgery.use_labels and not model.labelled_beside:
        raise UsageError(f"--surgery.use-labels: {model.name} learns nothing from labels; leave it out")
    if config.scale.gpus or config.data.gpu_memory is not None:
        given = "--scale.gpus" if config.scale.gpus else "--data.gpu-memory"
        raise UsageError(f"{given}: queries are mapped on processors so far; leave it out")
    if config.surgery.model:
        grow(model, model.schema, seed=config.seed, config=SurgeryConfig(model=config.surgery.model))


def config_of(settings: Mapping[str, Any], **direct: Any) -> MapConfig:
    """`MapConfig` from sections and direct options; a direct one goes before the section's field."""
    tree: dict[str, Any] = {name: dict(v) if isinstance(v, Mapping) else v for name, v in settings.items()}
    places = {"epochs": "optim", "batch_size": "data", "workers": "scale", "threads": "scale"}
    for name, value in direct.items():
        if value is None:
            continue
        if name in places:
            tree.setdefault(places[name], {})[name] = value
        else:
            tree[name] = value
    return checked(MapConfig, tree)


def _check_one_machine(out: str, config: MapConfig) -> None:
    """Refuse what would leave results on other machines.

    Raises:
        UsageError: workers of a cluster that is named.
    """
    named = config.scale.address or os.environ.get("RAY_ADDRESS")
    if config.scale.workers and named:
        raise UsageError(
            f"--out {shown(out)}: results are copied there from this machine, and the workers of the cluster {named} "
            "write on theirs; give a folder that all of them share, or leave --scale.address out"
        )


def _check_out(out: Path, tasks: Sequence[Task], reference: Path) -> None:
    """Refuse a folder in which a result would take the place of a query, or lie among the files of the reference.

    Raises:
        UsageError: naming the query.
    """
    if out.resolve() == reference.resolve():
        raise UsageError(f"--out {out}: is the folder of the reference; choose another one")
    results = {out.resolve() / f"{task.name}{ending}" for task in tasks for ending in (".h5ad", ".zarr", ".delta")}
    for task in tasks:
        if isinstance(task.source, str | Path) and not is_url(task.source) and Path(task.source).resolve() in results:
            raise UsageError(
                f"--out {out}: holds the query {task.path}, whose place its result would take; choose another folder"
            )


@contextmanager
def _sole_user(out: Path) -> Iterator[None]:
    """Nobody else writes to `out` within the block; what a killed mapping left half-written is gone.

    Raises:
        UsageError: it is a file. BusyError: another command is writing to it. StorageError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"--out {out}: is a file, and a folder was wanted") from error
    except OSError as error:
        raise StorageError(f"--out {out}: cannot be written ({error.strerror})") from error
    with sole_writer(out / SUMMARY):
        sweep(out)
        sweep(out / RECORDS)
        yield


@dataclass(frozen=True)
class _Valid:
    """What validation found out of a query that is to be mapped."""

    key: str
    n_cells: int


def _validated(job: Job, tasks: Sequence[Task], records: dict[str, Record], say: Told) -> dict[str, _Valid]:
    """The queries that are to be mapped, by name. Those that are done, or cannot be, are put into `records`.

    Every query is read and checked before the first is trained: a wrong --batch-key shows at once.
    """
    valid: dict[str, _Valid] = {}
    for task in tasks:
        began = time.monotonic()
        try:
            with fetched(task, job.results.out) as here:
                key = key_of(here, here.content_hash(), job.reference, job.config)
                done = job.results.record(task.name, key)
                if done is not None:
                    records[task.name] = done
                    say(task.name, {"state": "done", "reason": "was done already"})
                    continue
                valid[task.name] = _Valid(key, check_task(job, here).n_cells)
        except Exception as error:  # noqa: BLE001  (one query's failure is told and never stops the others)
            record = records[task.name] = failed(task, job.reference.schema, error, time.monotonic() - began)
            job.results.write_record(record)
            say(task.name, {"state": "failed", "reason": record["reason"]})
    return valid


def _mapped(job: Job, tasks: Sequence[Task], valid: Mapping[str, _Valid], say: Told) -> Iterator[tuple[str, Record]]:
    """(name, record) of each query as it is done; in this process, or in Ray tasks."""
    keys = {name: one.key for name, one in valid.items()}
    sizes = {name: one.n_cells for name, one in valid.items()}
    if tasks and job.config.scale.workers > 0:
        from scarcade.jobs.ray_tasks import map_on_ray

        yield from map_on_ray(job, packs_of(tasks, sizes, job.config.scale.workers), keys)
        return
    with threads_as_before() as before:
        threads = job.config.scale.threads or min(before, cores())
        for some in large_and_small(tasks, sizes):
            yield from map_in_lanes(job, some, keys, say, threads=threads)


@contextmanager
def threads_as_before() -> Iterator[int]:
    """After the block this process computes with as many threads as before it; gives that number."""
    import torch

    before = torch.get_num_threads()
    try:
        yield before
    finally:
        use_threads(before)
