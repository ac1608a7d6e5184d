"""A statistic of a whole batch is the same on any number of workers, and so is its gradient."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch
from scarcade.engine.gradients import GradientSum
from scarcade.engine.schema import Position
from scarcade.engine.together import with_others
from scarcade.engine.world import World
from tests.engine.toy import ToyCounts
from tests.engine.workers import on_workers

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
PLACES = {1: [range(7)], 3: [range(5), range(0), range(5, 7)]}  # one of three has no cell


def gradient(world: World) -> tuple[float, np.ndarray, list[int]]:
    """Of a penalty that is no sum over cells, by the weights, as the loop takes it."""
    rows = np.array(PLACES[world.size][world.rank], np.int64)
    linear = torch.nn.Linear(4, 3)
    torch.nn.init.ones_(linear.bias)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(12.0).view(3, 4) / 10)
    batch = with_others(
        Batch(
            counts=ToyCounts(X[rows].numpy()),
            batch=torch.from_numpy(rows),
            labels=torch.full((len(rows),), -1),
            rows=rows,
            position=Position(),
            lanes=((world.rank, len(rows)),),
            n_global=7,
        ),
        world,
    )
    gradients = GradientSum(linear, world, signals=1)
    z_BD = batch.together(torch.tanh(linear(X[rows])))
    penalty = torch.cdist(z_BD, z_BD).square().mean().sqrt()
    (penalty / world.size).backward()  # type: ignore[no-untyped-call]
    gradients.finish(torch.zeros(1), len(rows) / 7)
    assert linear.weight.grad is not None
    return penalty.item(), linear.weight.grad.numpy().copy(), batch.together(batch.batch).tolist()


@pytest.mark.long
def test_a_penalty_on_three_workers_is_that_of_one(tmp_path: Path) -> None:
    (alone,) = on_workers(1, tmp_path, gradient)
    for penalty, of_weight, rows in on_workers(3, tmp_path, gradient):
        assert rows == alone[2] == list(range(7))
        np.testing.assert_allclose(penalty, alone[0], rtol=1e-6)
        np.testing.assert_allclose(of_weight, alone[1], rtol=1e-5, atol=1e-7)
