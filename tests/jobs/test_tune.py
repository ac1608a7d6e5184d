import csv
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.cluster import cluster
from scarcade.engine.config import read_toml
from scarcade.engine.errors import DataChangedError, InputError, UsageError
from scarcade.jobs.tune import Search, tune
from scarcade.jobs.tune_trial import Trial

SPACE: dict[str, Any] = {"model.n_latent": {"choice": [2, 4]}, "optim.lr": {"loguniform": [1e-4, 2e-2]}}
SMALL: dict[str, Any] = {"model": {"n_hidden": 8}, "data": {"batch_size": 64}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return simulate(tmp_path_factory.mktemp("tune") / "a.zarr", cells=500, genes=40, batches=2, labels=3, seed=2)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One for the module: each search would else start its own."""
    with cluster(cpus=2):
        yield


def searched(store: Store, out: Path, said: list[Mapping[str, Any]] | None = None, **more: Any) -> Search:
    settings = {**SMALL, **more.pop("settings", {})}
    options: dict[str, Any] = {"space": SPACE, "trials": 6, "epochs": 4, "threads": 1, "seed": 1, **more}
    return tune(store, out=out, settings=settings, progress=(said if said is not None else []).append, **options)


def sampled(trials: list[Trial]) -> list[dict[str, Any]]:
    return [trial.parameters for trial in trials]


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_a_search_leaves_tables_a_report_and_a_configuration_that_train_takes(store: Store, tmp_path: Path) -> None:
    from scarcade.jobs.cli import main

    out = tmp_path / "s"
    said: list[Mapping[str, Any]] = []
    found = searched(store, out, said)
    states = [trial.state for trial in found.trials]
    assert len(states) == 6
    assert set(states) == {"done", "stopped"}
    assert all(trial.epochs == 4 for trial in found.trials if trial.state == "done")
    assert found.best.state == "done"
    assert found.value == min(value for trial in found.trials for _, value in trial.curve)
    rows = list(csv.DictReader((out / "trials.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [f"trial-{number:04d}" for number in range(6)]
    assert {"model.n_latent", "optim.lr", "elbo"} <= set(rows[0])
    assert len(json.loads((out / "trials.json").read_text())["trials"]) == 6
    assert (out / "report.html").exists()
    assert not list(out.glob("trials/*/checkpoints"))  # of what is over nothing large is left
    assert not list(out.glob(".tmp-*"))
    best = read_toml(out / "best.toml")
    assert best["optim"]["lr"] == found.best.parameters["optim.lr"]
    arguments = ["train", "--config", str(out / "best.toml"), "--data", str(store.path), "--out", str(tmp_path / "r")]
    assert main([*arguments, "--threads", "1"]) == 0
    again = read_toml(tmp_path / "r" / "config.toml")
    assert again["model"]["n_latent"] == found.best.parameters["model.n_latent"]

    # the same again does nothing; more trials are those of a search that was asked for more from the start
    before = (out / "trials.csv").read_bytes()
    said.clear()
    assert searched(store, out, said).best == found.best
    assert (out / "trials.csv").read_bytes() == before
    assert "done already" in str(said)
    more = searched(store, out, trials=8, refit=True)
    assert sampled(more.trials)[:6] == sampled(found.trials)
    assert more.trials[:6] == found.trials
    assert all(trial.state in ("done", "stopped") for trial in more.trials[6:])
    assert more.model == out / "refit" / "model"
    assert (out / "refit" / "model" / "model.safetensors").exists()


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_a_trial_that_fails_fails_alone(store: Store, tmp_path: Path) -> None:
    space = {"optim.lr": {"grid": [1e-3, 1e30]}}
    said: list[Mapping[str, Any]] = []
    settings = {"tune": {"search": "grid", "concurrent": 1, "defaults": True}}
    found = searched(store, tmp_path / "s", said, space=space, trials=None, settings=settings)
    assert [trial.name for trial in found.trials] == ["defaults", "trial-0000", "trial-0001"]
    assert [trial.state for trial in found.trials] == ["done", "done", "failed"]
    assert found.trials[0].curve == found.trials[1].curve  # 1e-3 is the default
    assert "not finite" in str(found.trials[2].reason)
    assert "1 of 3 trials failed" in str(said)
    assert re.search(f"^defaults +elbo {found.value:.6g}$", found.told(), re.MULTILINE)
    with pytest.raises(InputError, match=r"all 1 trials failed; 1 of them: .*not finite"):
        searched(store, tmp_path / "all", space={"optim.lr": {"choice": [1e30]}}, trials=1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("scheduler", ["median", "hyperband", "pbt", "fifo"])
def test_every_scheduler_comes_to_an_end(store: Store, tmp_path: Path, scheduler: str) -> None:
    settings = {"tune": {"scheduler": scheduler, "perturb": 1, "reduction": 2}}
    found = searched(store, tmp_path / "s", settings=settings)
    assert len(found.trials) == 6
    assert all(trial.state in ("done", "stopped") for trial in found.trials)
    assert all(math.isfinite(value) for trial in found.trials for _, value in trial.curve)
    if scheduler in ("pbt", "fifo"):
        assert all(trial.epochs == 4 for trial in found.trials)
    if scheduler == "hyperband":
        assert any(trial.state == "stopped" for trial in found.trials)
    again = searched(store, tmp_path / "s", settings=settings)
    assert again.trials == found.trials


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_optuna_suggests_and_is_told_what_was_before(store: Store, tmp_path: Path) -> None:
    settings = {"tune": {"search": "optuna", "scheduler": "median", "concurrent": 1}}
    found = searched(store, tmp_path / "s", settings=settings, objective="batch_score", trials=3)
    assert len({str(trial.parameters) for trial in found.trials}) == 3
    assert found.value == max(value for trial in found.trials for _, value in trial.curve)
    more = searched(store, tmp_path / "s", settings=settings, objective="batch_score", trials=5)
    assert more.trials[:3] == found.trials
    assert len(more.trials) == 5


def test_what_cannot_be_meant_is_told_before_anything_starts(store: Store, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"space": {"optim.lr": {"choice": ["fast"]}}}, r"optim.lr: cannot be 'fast'"),
        ({"objective": "elbow"}, "metric 'elbow': there is no such metric"),
        ({"objective": {"weights": {"elbo": 1, "total": 1}}}, r"of some of these less is better"),
        ({"objective": {"weights": {"elbo": "much"}}}, "the weight of elbo must be a number"),
        ({"workers": 2, "settings": {"tune": {"gpus": 0.5}}}, "--tune.gpus 0.5: with --workers 2 each worker needs a"),
        ({"workers": 3, "settings": {"data": {"lanes": 2}}}, "--workers 3: is more than --data.lanes 2"),
        ({"workers": 2, "settings": {"scale": {"min_workers": 1}}}, "--scale.min-workers: a trial has all its workers"),
        ({"trials": 0}, "--trials 0"),
        ({"settings": {"tune": {"scheduler": "bohb"}}}, r"--tune.scheduler: .*'asha'"),
        ({"settings": {"tune": {"search": "grid"}}}, r"optim.lr: --tune.search grid wants"),
        ({"settings": {"tune": {"search": "optuna", "scheduler": "pbt"}}}, "does not go with --tune.scheduler pbt"),
        ({"settings": {"optim": {"max_steps": 5}}}, "--optim.max-steps: trials are compared by epochs"),
        ({"out": "s3://bucket/search"}, "a search is kept in a folder"),
    ]
    for options, told in wrong:
        with pytest.raises(UsageError, match=told):
            searched(store, **{"out": tmp_path / "s", **options})
        assert not (tmp_path / "s").exists()


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_a_search_is_held_to_what_it_began_with(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "s"
    searched(store, out, trials=1, epochs=1)
    with pytest.raises(UsageError, match=r"--epochs was 1, now 2"):
        searched(store, out, trials=1, epochs=2)
    with pytest.raises(UsageError, match=r"optim.lr.* was \[0.0001, 0.02\], now \[0.0001, 0.01\]"):
        searched(store, out, trials=1, epochs=1, space={**SPACE, "optim.lr": {"loguniform": [1e-4, 1e-2]}})
    with pytest.raises(UsageError, match=r"--fixed.data.batch_size was 64, now 32"):
        searched(store, out, trials=1, epochs=1, batch_size=32)
    other = simulate(tmp_path / "other.zarr", cells=300, genes=40, batches=2, labels=3, seed=9)
    with pytest.raises(DataChangedError, match="began with other data"):
        searched(other, out, trials=1, epochs=1)
