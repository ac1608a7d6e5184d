"""Many workers: the same batches, the same losses, the same bits.

Starting a process costs seconds, so each group of workers does everything once, and the tests look at it.
"""

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scarcade.engine.checkpoint import CheckpointConfig, Checkpoints
from scarcade.engine.errors import NonFiniteError
from scarcade.engine.gradients import GradientSum, bucket_bytes_for
from scarcade.engine.loop import fit
from scarcade.engine.optim import OptimConfig
from scarcade.engine.world import World
from tests.engine.toy import ToyLoader, ToyModel, digest
from tests.engine.workers import on_workers

CONFIG = OptimConfig(epochs=2, lr=0.01, early_stopping=True, plateau=True, log_every=3, clip=40.0)


def trained(
    world: World, folder: str | None, stop_at: int | None, batch_norm: bool, *, parts: int = 1
) -> dict[str, Any]:
    """A run, stopped or resumed if a folder is given."""
    model = ToyModel(seed=world.rank if folder is None else 0, batch_norm=batch_norm)  # rank 0's weights must win
    train, validation = (ToyLoader(n_cells=n, seed=s, shard=world.shard) for n, s in ((203, 0), (61, 1)))
    checkpoints = None
    if folder is not None:
        about = {"data": train.fingerprint()}
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(), about=about, world=world)
    steps = iter(range(1000))
    result = fit(
        model,
        train,
        validation,
        CONFIG.model_copy(update={"accumulate": parts}),
        world=world,
        checkpoints=checkpoints,
        stop=(lambda: next(steps) == stop_at and world.rank == world.size - 1) if stop_at is not None else None,
    )
    return {"digest": digest(model), "history": result.history, "rows": train.seen, "stopped": result.stopped}


def everything(world: World, folder: str) -> dict[str, Any]:
    """All that the tests want of one group of workers."""
    return {
        "collectives": collectives(world),
        "plain": trained(world, None, None, False),
        "in parts": trained(world, None, None, False, parts=2),
        "of parts": of_parts(world),
        **{name: resumed(world, f"{folder}/{name}", name == "batch_norm") for name in ("layer_norm", "batch_norm")},
        "poisoned": poisoned(world),
        "frozen": frozen(world),
        "summed": [summed(world, size) for size in (1, 100, 25 << 20)],
        "over the group": over_the_group(world),
    }


def over_the_group(world: World) -> dict[str, Any]:
    """As workers that share no memory do it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "shared_sums", lambda world, parts: None)
        return {"summed": [summed(world, size) for size in (1, 100)], "plain": trained(world, None, None, False)}


def resumed(world: World, folder: str, batch_norm: bool) -> dict[str, Any]:
    """The same run whole, stopped in its tenth step, and continued."""
    return {
        "whole": trained(world, f"{folder}-whole", None, batch_norm),
        "part": trained(world, folder, 9, batch_norm),
        "again": trained(world, folder, None, batch_norm),
    }


def collectives(world: World) -> bool:
    assert world.say({"a": [1, 2.5, "ü"]} if world.first else None) == {"a": [1, 2.5, "ü"]}
    assert world.sum(torch.tensor([float(world.rank)])).item() == sum(range(world.size))
    tensor = torch.full((2,), float(world.rank + 5))
    world.from_first([tensor])
    return bool((tensor == 5).all()) and world.shard.size == world.size


def frozen(world: World) -> bool:
    """Whether running statistics that nothing may move are the same after the sum over workers, bit for bit."""
    model = ToyModel(batch_norm=True)
    norm = model.norm
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    norm.momentum = 0.0
    norm.running_mean.copy_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
    before = norm.running_mean.clone()
    gradients = GradientSum(model, world, 1)
    norm(torch.randn(4, 16)).sum().backward()
    gradients.finish(torch.zeros(1), (1, 3, 7)[world.rank] / (4, 11)[world.size - 2])
    return torch.equal(norm.running_mean, before)


def poisoned(world: World) -> tuple[str, str]:
    model, loader = ToyModel(), ToyLoader(shard=world.shard, poison=100)
    with pytest.raises(NonFiniteError) as caught:
        fit(model, loader, None, OptimConfig(epochs=1), world=world)
    assert all(bool(v.isfinite().all()) for v in model.state_dict().values())
    return str(caught.value).split(":")[0], digest(model)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.idle = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.b(self.a(x).relu())).square().sum()


def inputs(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def summed(world: World, bucket_bytes: int) -> list[np.ndarray]:
    """Gradients after three steps in buckets of a size, and the signals."""
    model = Two()
    gradients = GradientSum(model, world, 2, bucket_bytes=bucket_bytes)
    for step in range(3):
        model.zero_grad(set_to_none=True)
        model(inputs(world.rank, step)).backward()
        signals = gradients.finish(torch.tensor([1.0, float(world.rank)]), 1 / world.size)
    gradients.close()
    return [*(p.grad.numpy().copy() for p in model.parameters() if p.grad is not None), signals.numpy().copy()]


def of_parts(world: World) -> list[np.ndarray]:
    """Gradients of two parts, the second of which does not touch the first layer."""
    model = Two()
    gradients = GradientSum(model, world, 1)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with gradients.held():
            model(inputs(world.rank, 0)).backward()
        model.b(torch.full((4, 7), 1.0 + world.rank)).square().sum().backward()
        gradients.finish(torch.zeros(1), 1 / world.size)
    gradients.close()
    return [p.grad.numpy().copy() for p in model.parameters() if p.grad is not None]


class Noting:
    """A world of two, of which this worker notes which gradients it has when a sum begins."""

    size = 2

    def __init__(self, model: nn.Module) -> None:
        self.there: set[str] = set()
        self.sums: list[tuple[int, set[str]]] = []
        for name, parameter in model.named_parameters():
            hook: Any = lambda _, name=name: self.there.add(name)  # noqa: E731
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def shared_sums(self, parts: Any) -> None:
        return None

    def sum_later(self, flat: torch.Tensor) -> Any:
        self.sums.append((flat.numel(), set(self.there)))
        return types.SimpleNamespace(wait=lambda: None)


def test_the_last_layers_travel_while_the_first_are_at_work() -> None:
    model = nn.Sequential(nn.Linear(2000, 128), nn.ReLU(), nn.Linear(128, 2000))
    world: Any = Noting(model)
    gradients = GradientSum(model, world, 2)
    model(torch.randn(4, 2000)).square().sum().backward()
    gradients.finish(torch.zeros(2), 0.5)
    gradients.close()
    (first, there), (last, _) = world.sums
    assert there <= {"2.weight", "2.bias"}  # (the bias may be noted after its sum began)
    assert (first, last) == (2000 * 128 + 2000, 2000 * 128 + 128 + 2)


@pytest.mark.parametrize(("of", "expected"), [(1000, 256 << 10), (4 << 20, 1 << 20), (1 << 30, 25 << 20)])
def test_buckets_are_a_quarter_of_the_model_within_bounds(of: int, expected: int) -> None:
    assert bucket_bytes_for(of) == expected


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return trained(World(), None, None, False)


@pytest.fixture(scope="module", params=[2, 3])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    return on_workers(request.param, folder, everything, str(folder))


def test_collectives(many: list[dict[str, Any]]) -> None:
    assert all(run["collectives"] for run in many)


def test_any_number_of_workers_sees_the_same_batches_and_losses(many: list[dict[str, Any]], alone: Any) -> None:
    runs = [run["plain"] for run in many]
    group = [run["over the group"]["plain"]["digest"] for run in many]
    assert len({run["digest"] for run in runs}) == len(set(group)) == 1  # the ranks agree to the bit
    assert len(many) > 2 or group[0] == runs[0]["digest"]  # two numbers have one sum
    for step, rows in enumerate(alone["rows"]):
        together = np.concatenate([run["rows"][step] for run in runs])
        assert np.array_equal(np.sort(together), np.sort(rows))
    for line, expected in zip(runs[0]["history"], alone["history"], strict=True):
        for name in [k for k in expected if "/" in k]:
            assert line[name] == pytest.approx(expected[name], rel=1e-6)


def test_frozen_statistics_of_a_reference_stay_bit_for_bit(many: list[dict[str, Any]]) -> None:
    assert all(run["frozen"] for run in many)


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_stopped_and_resumed_it_ends_with_the_same_bits(many: list[dict[str, Any]], norm: str) -> None:
    assert all(run[norm]["part"]["stopped"] == "interrupted" for run in many)  # one asked, all of them stopped
    assert len({run[norm][which]["digest"] for run in many for which in ("whole", "again")}) == 1


def test_a_bad_cell_on_one_worker_stops_all_before_the_update(many: list[dict[str, Any]]) -> None:
    assert len({run["poisoned"] for run in many}) == 1


def test_the_sum_over_workers_is_that_of_one_worker_with_all_cells(many: list[dict[str, Any]]) -> None:
    model = Two()
    model(torch.cat([inputs(rank, 2) for rank in range(len(many))])).backward()
    expected = [(torch.zeros_like(p) if p.grad is None else p.grad).numpy() for p in model.parameters()]
    for run in many:
        for *gradients, signals in (*run["summed"], *run["over the group"]["summed"]):
            for found, wanted in zip(gradients, expected, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
            assert signals.tolist() == [len(many), sum(range(len(many)))]


def test_workers_compute_a_batch_in_parts(many: list[dict[str, Any]], alone: Any) -> None:
    assert len({run["in parts"]["digest"] for run in many}) == 1
    for line, expected in zip(many[0]["in parts"]["history"], alone["history"], strict=True):
        for name in [k for k in expected if "/" in k]:
            assert line[name] == pytest.approx(expected[name], rel=1e-6)


def test_the_gradient_of_a_part_that_is_not_the_last_is_not_lost(many: list[dict[str, Any]]) -> None:
    model = Two()
    for rank in range(len(many)):
        model(inputs(rank, 0)).backward()
        model.b(torch.full((4, 7), 1.0 + rank)).square().sum().backward()
    expected = [(torch.zeros_like(p) if p.grad is None else p.grad).numpy() for p in model.parameters()]
    for run in many:
        for found, wanted in zip(run["of parts"], expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_alone_a_parameter_that_was_not_touched_has_a_gradient_of_zeros() -> None:
    model = Two()
    gradients = GradientSum(model, World(), 1)
    model(inputs(0, 0)).backward()
    assert gradients.finish(torch.tensor([4.0]), 1.0).tolist() == [4]
    assert model.idle.weight.grad is not None
    assert not model.idle.weight.grad.any()
