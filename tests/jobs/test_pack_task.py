"""Queries of one pack: each comes out as alone, whatever becomes of the others, in one thread or two."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.jobs.lanes import map_in_lanes
from scarcade.jobs.mapping import config_of, map_queries, threads_as_before
from scarcade.jobs.pack_task import map_tasks
from scarcade.jobs.queries import Task, tasks_of
from scarcade.jobs.query_task import Job
from scarcade.jobs.reference import Reference, load_reference
from scarcade.jobs.results import Record, Results
from scarcade.models.saved import read_delta
from scarcade.models.scvi import Scvi
from tests.jobs.conftest import Atlas

SETTINGS: dict[str, Any] = {"optim": {"lr": 0.01}}
EPOCHS = 3


def several(atlas: Atlas) -> dict[str, Any]:
    """Queries of several sizes, two of them with batches of the same name."""
    cells = ad.read_h5ad(atlas.query)
    rng = np.random.default_rng(0)
    found = {}
    for number, n in enumerate((60, 1, 130, 200, 33, 7)):
        found[f"q{number}"] = part = cells[np.sort(rng.choice(cells.n_obs, n, replace=False))].copy()
        part.obs["donor"] = [f"d{i % (1 + number % 2)}" for i in range(n)]
    return found


@pytest.fixture(scope="module")
def reference(atlas: Atlas) -> Reference:
    return load_reference(atlas.model, config_of({}).transfer)


def job_of(reference: Reference, out: Path, **settings: Any) -> Job:
    return Job(reference, config_of({**SETTINGS, **settings}, epochs=EPOCHS), Results(out))


def mapped(job: Job, queries: dict[str, Any], threads: int = 1) -> dict[str, Record]:
    tasks: list[Task] = tasks_of(queries, batch_key="donor")
    keys = {task.name: "key" for task in tasks}
    with threads_as_before():
        return dict(map_in_lanes(job, tasks, keys, lambda name, line: None, threads=threads))


def assert_same_results(one: Path, other: Path, name: str, reference: Reference) -> None:
    first, second = (ad.read_h5ad(out / f"{name}.h5ad") for out in (one, other))
    for key in ("X_scVI", "X_scVI_variance"):
        np.testing.assert_array_equal(first.obsm[key], second.obsm[key])
    for column in ("label_pred", "label_uncertainty", "reference_distance"):
        assert first.obs[column].equals(second.obs[column])
    rows, same = (read_delta(out / f"{name}.delta", reference.model).state_dict() for out in (one, other))
    assert all(np.array_equal(rows[k].numpy(), same[k].numpy()) for k in rows)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_query_comes_out_as_alone(atlas: Atlas, reference: Reference, tmp_path: Path, threads: int) -> None:
    queries = several(atlas)
    records = mapped(job_of(reference, tmp_path / "all"), queries, threads)
    assert {record["state"] for record in records.values()} == {"done"}
    for name in ("q0", "q1", "q3"):
        mapped(job_of(reference, tmp_path / name), {name: queries[name]})
        assert_same_results(tmp_path / "all", tmp_path / name, name, reference)
    for name, record in records.items():
        assert len(record["history"]) == EPOCHS
        assert record["n_cells"] == queries[name].n_obs
        assert 0 <= record["seconds_training"] < record["seconds"]
    assert records["q3"]["seconds_training"] > 0


def test_what_is_held_out_is_watched_in_packs_too(atlas: Atlas, reference: Reference, tmp_path: Path) -> None:
    job = job_of(reference, tmp_path, data={"validation": 0.2}, optim={"lr": 0.01, "early_stopping": True})
    records = mapped(job, several(atlas))
    assert {record["state"] for record in records.values()} == {"done"}
    assert all("validation/elbo" in point for point in records["q3"]["history"])


def like(reference: Reference, kind: type[Scvi]) -> Scvi:
    """The reference's model as one of another class."""
    model = kind(reference.model.config, reference.schema)
    model.load_state_dict(reference.model.state_dict())
    model.fingerprint, model.record = reference.model.fingerprint, reference.model.record
    return model


class Breaks(Scvi):
    """A model that a query with a certain number of cells breaks, and everyone who trains with it."""

    cells = 33

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        if self.cells in (batch.queries or ()):
            raise MemoryError
        return super().losses(batch, step, noise)


def test_whose_fault_it_was_that_a_step_failed_is_found_out(atlas: Atlas, reference: Reference, tmp_path: Path) -> None:
    queries = several(atlas)
    broken = replace(reference, model=like(reference, Breaks))
    records = mapped(job_of(broken, tmp_path / "all"), queries)
    assert {name for name, record in records.items() if record["state"] == "failed"} == {"q4"}
    assert "memory" in records["q4"]["reason"]
    assert records["q4"]["exit_code"] == 5
    good = {name: cells for name, cells in queries.items() if name != "q4"}
    mapped(job_of(reference, tmp_path / "good"), good)
    for name in good:
        assert_same_results(tmp_path / "all", tmp_path / "good", name, reference)


class Crowded(Scvi):
    """A model whose memory is enough for one query at a time."""

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        if batch.n_global > 140:
            raise MemoryError
        return super().losses(batch, step, noise)


def test_who_found_no_memory_among_others_is_tried_again_alone(
    atlas: Atlas, reference: Reference, tmp_path: Path
) -> None:
    crowded = replace(reference, model=like(reference, Crowded))
    records = mapped(job_of(crowded, tmp_path / "all"), several(atlas))
    assert {record["state"] for record in records.values()} == {"done"}
    mapped(job_of(reference, tmp_path / "plain"), several(atlas))
    for name in records:
        assert_same_results(tmp_path / "all", tmp_path / "plain", name, reference)


def test_a_query_whose_constants_are_too_many_to_keep_changes_no_other(
    atlas: Atlas, reference: Reference, tmp_path: Path
) -> None:
    cells = ad.read_h5ad(atlas.query)
    large = ad.AnnData(cells.X[np.arange(3_000) % cells.n_obs], var=cells.var)
    large.obs["donor"] = "d0"
    queries = {**several(atlas), "large": large}
    little = {"memory": 1 << 20}
    records = mapped(job_of(reference, tmp_path / "all", data=little), queries)
    assert {record["state"] for record in records.values()} == {"done"}
    mapped(job_of(reference, tmp_path / "large", data=little), {"large": large})
    mapped(job_of(reference, tmp_path / "few", data=little), several(atlas))
    assert_same_results(tmp_path / "all", tmp_path / "large", "large", reference)
    for name in several(atlas):
        assert_same_results(tmp_path / "all", tmp_path / "few", name, reference)


def test_one_that_is_not_finite_fails_alone(atlas: Atlas, reference: Reference, tmp_path: Path) -> None:
    job = job_of(reference, tmp_path, optim={"lr": 1e40})  # weights of new rows overflow at once
    records = mapped(job, several(atlas))
    assert {record["state"] for record in records.values()} == {"failed"}
    assert all("not finite" in record["reason"] and "--optim.lr" in record["reason"] for record in records.values())


def test_what_is_aboard_when_it_is_stopped_was_never_there(atlas: Atlas, reference: Reference, tmp_path: Path) -> None:
    tasks = tasks_of(several(atlas), batch_key="donor")
    stop = threading.Event()

    def say(name: str, line: Any) -> None:
        stop.set()  # after the first epoch of the first query

    job = job_of(reference, tmp_path)
    assert list(map_tasks(job, tasks, {t.name: "key" for t in tasks}, say, stopped=stop.is_set)) == []
    assert not list(tmp_path.glob("*.h5ad"))


def test_one_who_listens_is_told_by_one_thread_at_a_time(atlas: Atlas, tmp_path: Path) -> None:
    inside: list[str] = []
    told: dict[str, int] = {}

    def say(name: str, line: Any) -> None:
        assert not inside
        inside.append(name)
        told[name] = told.get(name, 0) + ("epoch" in line)
        inside.pop()

    queries = several(atlas)
    result = map_queries(atlas.model, queries, tmp_path, batch_key="donor", epochs=EPOCHS, threads=2, told=say)
    result.raise_if_failed()
    assert told == dict.fromkeys(queries, EPOCHS)
