import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import UsageError
from scarcade.jobs.cli import main
from scarcade.jobs.train import train
from tests.event_files import curves

SMALL: dict[str, Any] = {
    "model": {"n_hidden": 8, "n_latent": 4},
    "optim": {"log_every": 2},
    "scale": {"threads": 1},
    "data": {"batch_size": 64},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return simulate(tmp_path_factory.mktemp("curves") / "a.zarr", cells=500, genes=50, batches=2, labels=3, seed=2)


def test_a_continued_run_continues_its_curves(store: Store, tmp_path: Path) -> None:
    logged = {**SMALL, "log": {"to": ["tensorboard"]}}
    train(store, out=tmp_path / "run", epochs=2, settings=SMALL)
    assert not (tmp_path / "run" / "tensorboard").exists()
    train(store, out=tmp_path / "run", epochs=2, settings=logged)  # is over: its curves are drawn all the same
    train(store, out=tmp_path / "run", epochs=4, settings=logged)
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = curves(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["cells"]] == [line["step"] for line in lines]
    epochs = [line for line in lines if line["of"] == "epoch"]
    assert len(epochs) == 4
    drawn = found["validation/elbo"]
    assert [step for step, _ in drawn] == [line["step"] for line in epochs]
    assert [value for _, value in drawn] == pytest.approx([line["validation/elbo"] for line in epochs], rel=1e-6)


def test_a_target_that_cannot_be_written_leaves_the_training_alone(store: Store, tmp_path: Path) -> None:
    said: list[Mapping[str, Any]] = []
    train(store, out=tmp_path / "run", epochs=1, settings=SMALL)
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    logged = {**SMALL, "log": {"to": ["tensorboard"]}}
    done = train(store, out=tmp_path / "run", epochs=3, settings=logged, progress=said.append)
    assert done.stopped == "epochs"
    warned = [message["warning"] for message in said if "warning" in message]
    assert len(warned) == 1
    assert "TensorBoard gets no more metrics" in warned[0]


def test_where_curves_go_is_refused_before_anything_starts(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(store.place), "--out", str(tmp_path / "run"), "--log", "paper"]
    assert main(command) == 2
    assert "'tensorboard', 'mlflow' or 'wandb'" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--log (mlflow|wandb)"):
        train(store, out=f"file://{tmp_path}/url", settings={**SMALL, "log": {"to": ["mlflow"]}})
    assert not (tmp_path / "run").exists()


def test_a_profile_tells_where_all_of_the_time_went(store: Store, tmp_path: Path) -> None:
    said: list[Mapping[str, Any]] = []
    train(store, out=tmp_path / "run", epochs=3, settings=SMALL, profile=True, progress=said.append)
    told = json.loads((tmp_path / "run" / "profile.json").read_text())
    (worker,) = told["workers"]
    assert told["steps"] == 24
    assert sum(worker["share"].values()) == pytest.approx(1.0, abs=1e-3)
    assert sum(worker["seconds"].values()) == pytest.approx(worker["wall_s"], abs=1e-2)
    assert min(worker["seconds"][part] for part in ("forward", "backward", "saving the model")) > 0
    assert (tmp_path / "run" / "profile" / "trace-0.json").is_file()
    assert "in all" in str(said[-1]["note"])
    again = train(store, out=tmp_path / "plain", epochs=3, settings=SMALL)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "plain")]
    assert weights[0] == weights[1]
    assert again.stopped == "epochs"
