"""Commands as jobs of a real Ray head that asks for a token: logs, exit codes, joining, stopping, continuing."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import pytest
import requests

from scarcade.dataloaders.synthetic import simulate
from scarcade.jobs.cli import main
from tests.cluster.head import Head, head

pytest.importorskip("aiohttp_cors", reason="a Ray head that takes jobs needs ray[default]")
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ray() -> Iterator[Head]:
    with head() as started:
        yield started


@pytest.fixture
def _user(ray: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody in a clean folder who knows the address and the token."""
    (tmp_path / "clean").mkdir()
    monkeypatch.chdir(tmp_path / "clean")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray.url)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(ray.token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)


def ended(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command line."""
    capsys.readouterr()
    code = main([str(part) for part in argv])
    out, err = capsys.readouterr()
    return code, out, err


def files(folder: Path) -> list[Path]:
    store = simulate(folder / "all.zarr", cells=900, genes=60, batches=3, labels=3)
    paths = []
    for name in store.schema.batch.values:
        cells = store.to_anndata([name])
        cells.obs["label"] = cells.obs["label"].astype(str)
        cells.write_h5ad(folder / f"{name}.h5ad")
        paths.append(folder / f"{name}.h5ad")
    return paths


def training_runs(ray: Head) -> list[dict[str, Any]]:
    """What the page of trainings of Ray's dashboard shows."""
    headers = {"Authorization": f"Bearer {ray.token.read_text()}"}
    answer = requests.get(f"{ray.url}/api/train/v2/runs/v1", headers=headers, timeout=30)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["train_runs"]
    return found


@pytest.mark.usefixtures("_user")
def test_from_files_to_mapped_queries(
    ray: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, query = files(tmp_path)
    store, run, mapped = tmp_path / "atlas.zarr", tmp_path / "run", tmp_path / "mapped"
    code, log, err = ended(
        capsys, "submit", "--wait", "--", "ingest", first, second, "--out", store, "--label-key", "label"
    )
    assert code == 0, log + err
    assert f"{store}: 596 cells" in log
    assert "warning" not in err
    assert "every node" in err

    # the file that says how to train lies in the user's folder, and travels with the job
    Path("train.toml").write_text("epochs = 2\n[model]\nn_hidden = 16\n[scale]\nworkers = 1\nthreads = 1\n")
    train = ("train", "--data", store, "--out", run, "--config", "train.toml", "--recipe", "scarches")
    code, out, _ = ended(capsys, "submit", "--", *train)
    assert code == 0
    (ident,) = out.split()
    code, out, err = ended(capsys, "submit", "--", *train)  # a second one joins
    assert (code, out.split()) == (0, [ident])
    assert "joined" in err
    code, _, err = ended(capsys, "submit", "--", *train, "--epochs", 3)
    assert code == 5
    assert "other options" in err
    code, log, err = ended(capsys, "jobs", "logs", ident, "--follow")
    assert code == 0, log + err
    assert f"{run}/model" in log
    assert (run / "model" / "model.safetensors").is_file()
    assert [(told["name"], told["status"]) for told in training_runs(ray)] == [("run", "FINISHED")]

    (tmp_path / "cut.h5ad").write_bytes(query.read_bytes()[:20_000])
    mapping = ("map", run / "model", query, tmp_path / "cut.h5ad", "--out", mapped, "--epochs", 1)
    code, log, err = ended(capsys, "submit", "--wait", "--cpus", 1, "--", *mapping, "--batch-key", "batch")
    assert code == 3, log + err
    assert "1 of 2 queries could not be mapped" in log
    assert "label_pred" in ad.read_h5ad(mapped / "batch2.h5ad").obs
    code, log, _ = ended(capsys, "submit", "--wait", "--", "ingest", first, "--out", store)
    assert code != 0  # it is there already: the command's own refusal, and the second attempt of that run
    assert "error:" in log

    _, listed, _ = ended(capsys, "jobs", "list", "--json")
    jobs = json.loads(listed)
    assert [job["exit_code"] for job in jobs] == [0, 0, 3, code]
    assert [job["state"] for job in jobs] == ["succeeded", "succeeded", "failed", "failed"]
    assert jobs[3]["id"] == f"{jobs[0]['id']}-2"

    token = ray.token.read_text()
    assert token not in listed
    monkeypatch.setenv("RAY_AUTH_TOKEN", token[::-1])
    code, _, err = ended(capsys, "jobs", "list")
    assert code == 5
    assert "does not take this token" in err
    assert token[::-1] not in err
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code, _, err = ended(capsys, "jobs", "list")
    assert code == 5
    assert "RAY_AUTH_TOKEN_PATH" in err


@pytest.mark.slow
@pytest.mark.usefixtures("_user")
def test_a_job_is_stopped_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate(tmp_path / "atlas.zarr", cells=3_000, genes=60, batches=3, labels=3)
    run = tmp_path / "run"

    def train(workers: int, *more: object) -> tuple[object, ...]:
        argv = ("train", "--data", tmp_path / "atlas.zarr", "--out", run, "--workers", workers, "--threads", 1, *more)
        return "submit", "--", *argv

    code, out, _ = ended(capsys, *train(2, "--epochs", 2000))
    assert code == 0
    (ident,) = out.split()
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(3)
    code, _, err = ended(capsys, "jobs", "stop", ident)
    assert code == 0
    assert "is stopped" in err
    code, log, _ = ended(capsys, "jobs", "logs", ident, "--follow")
    assert code == 143
    assert "the same command continues" in log
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()]
    assert steps

    code, out, _ = ended(capsys, *train(2, "--epochs", 2000))
    assert (code, out.split()) == (0, [f"{ident}-2"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if lines[-1]["step"] > max(steps):
            break
        time.sleep(1)
    told = [line["step"] for line in lines if line.get("of") == "epoch"]
    assert told == sorted(set(told))  # continued, and not begun again
    assert max(told) > max(steps)
    code, _, _ = ended(capsys, "jobs", "stop", ident)  # the id of a run is that of its latest attempt
    assert code == 0
    _, out, _ = ended(capsys, "jobs", "list", "--json")
    assert [job["state"] for job in json.loads(out) if job["run"] == ident] == ["stopped", "stopped"]


@pytest.mark.slow
@pytest.mark.usefixtures("_user")
def test_what_cannot_run_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made.zarr"
    made = ("simulate", out, "--cells", 300, "--genes", 40)
    code, _, err = ended(capsys, "submit", "--wait", "--python", "/nowhere/python", "--name", "a", "--", *made)
    assert code == 127
    assert "--python" in err
    code, _, err = ended(capsys, "submit", "--name", "b", "--cpus", 1000, "--", *made)
    assert code == 0
    code, _, err = ended(capsys, "jobs", "stop", "b")
    assert code == 0
    assert "has not begun" in err
    code, _, err = ended(capsys, "submit", "--wait", "--name", "c", "--", "inspect", tmp_path / "nothing")
    assert code == 4
    assert "those of the cluster's nodes" in err
    assert not os.path.exists(out)


@pytest.mark.slow
@pytest.mark.usefixtures("_user")
def test_a_search_is_a_job_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = tmp_path / "atlas.zarr", tmp_path / "search"
    simulate(store, cells=600, genes=50, batches=2, labels=3)
    Path("tune.toml").write_text("epochs = 2\ntrials = 3\n[space]\nmodel.n_latent = {choice = [4, 6]}\n")
    tune = ("tune", "--data", store, "--out", out, "--config", "tune.toml", "--threads", 1, "--tune.concurrent", 1)
    code, log, err = ended(capsys, "submit", "--wait", "--", *tune)
    assert code == 0, log + err
    assert json.loads((out / "trials.json").read_text())
    assert (out / "best.toml").is_file()
    assert (out / "report.html").is_file()
    code, log, err = ended(capsys, "submit", "--wait", "--", *tune)  # a second attempt finds that nothing is missing
    assert code == 0, log + err
