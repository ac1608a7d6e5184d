"""Every model on one and on two workers of Ray Train: the same batches, the same losses, the same weights.

Starting workers costs seconds, so one group of them trains all models, one after the other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.cluster import cluster
from scarcade.engine.interrupts import Interrupts
from scarcade.engine.launch import Scale, Worker, run
from scarcade.engine.metrics import MetricsFile
from scarcade.jobs.train_config import resolved
from scarcade.jobs.train_work import work
from tests.every_model import EVERY, made_store, recipe_of, same_on_any_workers


def train_all(worker: Worker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Each training as `train` has it done, on the workers that are there."""
    store = open_store(arguments["store"])
    for name in EVERY:
        config = resolved(
            {**same_on_any_workers(name, store.schema), "checkpoint": {"every_seconds": None}},
            name=name,
            recipe=recipe_of(name),
            store=store,
        )
        out = Path(arguments["out"], name)
        out.mkdir(parents=True, exist_ok=True)
        worker.world.sum(torch.zeros(1))  # the folder is there for all of them
        work(
            replace(worker, announce=None),
            {
                "config": config.model_dump(mode="json"),
                "data": arguments["store"],
                "fingerprint": store.fingerprint,
                "out": str(out),
            },
        )
    return {}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(tmp_path_factory.mktemp("every") / "a.zarr")


@pytest.fixture(scope="module")
def trained(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """Folders of runs of all models, by the number of workers; 0 is this process."""
    folder = tmp_path_factory.mktemp("runs")
    places = {workers: folder / str(workers) for workers in (0, 1, 2)}
    with cluster(cpus=2):
        for workers, place in places.items():
            run(
                train_all,
                {"store": str(store.path), "out": str(place)},
                Scale(workers=workers, threads=1),
                str(place),
                tell=lambda _: None,
                interrupts=Interrupts(),
            )
        yield places


def weights(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / name / "model" / "model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_one_worker_has_the_weights_of_no_worker(name: str, trained: dict[int, Path]) -> None:
    here, there = weights(trained[0], name), weights(trained[1], name)
    assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_two_workers_have_the_losses_and_weights_of_one(name: str, trained: dict[int, Path]) -> None:
    one, two = (list(MetricsFile(trained[n] / name / "metrics.jsonl").read()) for n in (1, 2))
    assert len(one) == len(two) > 5
    for line, other in zip(one, two, strict=True):
        names = [key for key in line if "/" in key]
        np.testing.assert_allclose([other[key] for key in names], [line[key] for key in names], rtol=1e-4, atol=1e-6)
    moved = 0.0
    for key, tensor in weights(trained[1], name).items():
        torch.testing.assert_close(weights(trained[2], name)[key], tensor, rtol=1e-4, atol=1e-6)
        moved = max(moved, float(tensor.abs().max()))
    assert moved > 0
