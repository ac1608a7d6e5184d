"""Training on a GPU, as a user asks for it: the numbers of a CPU, to be repeated and resumed. Skipped without one."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarcade.dataloaders.store import Store
from scarcade.engine import recorded
from scarcade.engine.config import merged
from scarcade.engine.errors import NonFiniteError
from scarcade.jobs.train import TrainedRun, train
from scarcade.jobs.trained import load
from tests.every_model import EVERY, made_store, recipe_of, settings_of
from tests.gpu import needs_a_gpu

pytestmark = needs_a_gpu
GPU: dict[str, Any] = {"scale": {"gpus": True}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(tmp_path_factory.mktemp("gpu") / "a.zarr")


def trained(store: Store, name: str, out: Path, *more: Mapping[str, Any]) -> TrainedRun:
    settings = settings_of(name, store.schema)
    for one in more:
        settings = merged(settings, one)
    return train(store, name, out=out, recipe=recipe_of(name), settings=settings, progress=lambda _: None)


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", EVERY)
def test_losses_and_latents_are_those_of_a_cpu(store: Store, tmp_path: Path, name: str) -> None:
    """Noise included: a GPU draws the same numbers."""
    here, there = trained(store, name, tmp_path / "cpu"), trained(store, name, tmp_path / "gpu", GPU)
    for one, other in zip(here.history, there.history, strict=True):
        terms = [key for key in one if key.startswith(("train/", "validation/"))]
        assert terms
        for key in terms:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-3), key
    first, second = (run.model.get_latent_representation(store) for run in (here, there))
    assert np.allclose(first, second, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", EVERY)
def test_a_run_can_be_repeated_and_resumed_to_the_bit(store: Store, tmp_path: Path, name: str) -> None:
    longer = {"optim": {"epochs": 3}}
    trained(store, name, tmp_path / "whole", GPU, longer)
    trained(store, name, tmp_path / "part", GPU, {"optim": {"epochs": 1}})
    trained(store, name, tmp_path / "part", GPU, longer)
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", EVERY)
def test_steps_that_are_replayed_give_the_bits_of_those_that_are_asked_for(
    store: Store, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, replayed = recorded._Record.replay, []

    def counted(self: Any, *given: Any) -> Any:
        replayed.append(1)
        return replay(self, *given)

    monkeypatch.setattr(recorded._Record, "replay", counted)
    # the rate changes, and the KL weight is no number that float32 has
    longer = {"optim": {"epochs": 4, "kl_epochs": 7.0, "plateau": True, "plateau_patience": 0, "plateau_delta": 1e9}}
    one = trained(store, name, tmp_path / "asked", GPU, longer, {"optim": {"record": False}})
    assert not replayed
    other = trained(store, name, tmp_path / "replayed", GPU, longer)
    assert len(replayed) > other.history[-1]["step"] // 2
    assert weights(tmp_path / "asked") == weights(tmp_path / "replayed")
    for first, second in zip(one.history, other.history, strict=True):
        for key in first:
            if key not in ("time", "cells_per_s", "wait"):
                assert second[key] == pytest.approx(first[key], rel=1e-9), key


@pytest.mark.parametrize("name", ["scvi", "totalvi"])
def test_every_kind_of_product_and_parts_of_a_batch_are_near(store: Store, tmp_path: Path, name: str) -> None:
    """Batch norm is of each part."""
    ways: list[dict[str, Any]] = [{}, {"optim": {"products": "bfloat16"}}, {"optim": {"accumulate": 4}}]
    runs = [trained(store, name, tmp_path / str(number), GPU, way) for number, way in enumerate(ways)]
    first, *others = [run.history[-1]["train/loss"] for run in runs]
    assert others == pytest.approx([first] * len(others), rel=0.02)


def test_every_likelihood_path_gives_the_same_losses(store: Store, tmp_path: Path) -> None:
    paths = ("auto", "fused", "analytic", "eager")
    runs = [trained(store, "scvi", tmp_path / path, GPU, {"model": {"likelihood_path": path}}) for path in paths]
    first, *others = [run.history[-1]["train/loss"] for run in runs]
    assert others == pytest.approx([first] * len(others), rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_cells(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step \d+: the loss or its gradient is not finite"):
        trained(store, "scvi", tmp_path / "run", GPU, {"optim": {"lr": 1e30, "epochs": 20}})


def test_a_worker_of_ray_trains_on_its_gpu_as_this_process_does(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    alone = trained(store, "scvi", tmp_path / "alone", GPU)
    worker = trained(store, "scvi", tmp_path / "ray", GPU, {"scale": {"workers": 1}, "data": {"lanes": 8}})
    for one, other in zip(alone.history, worker.history, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)


def test_a_model_from_a_gpu_is_loaded_where_there_is_none(store: Store, tmp_path: Path) -> None:
    run = trained(store, "scvi", tmp_path / "run", GPU)
    again = load(tmp_path / "run" / "model")
    first, second = run.model.get_latent_representation(store), again.get_latent_representation(store)
    assert np.allclose(first, second, atol=1e-5)


ASKS = """
import sys
from scarcade.dataloaders.store import open_store
from scarcade.engine.errors import UsageError
from scarcade.jobs.train import train
from scarcade.models.scvi import Scvi
losses = Scvi.losses
def asking(self, *given):
    found = losses(self, *given)
    found.minimise.sum().item()  # waits for the GPU
    return found
Scvi.losses = asking
settings = {"optim": {"epochs": 2}, "data": {"batch_size": 64}, "scale": {"gpus": True}}
try:
    train(open_store(sys.argv[1]), "scvi", out=sys.argv[2], settings=settings, progress=lambda _: None)
except UsageError as error:
    print(error)
"""


def test_a_step_that_cannot_be_recorded_is_told_with_the_option(store: Store, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASKS, str(store.path), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "--optim.record false" in done.stdout, done.stderr
