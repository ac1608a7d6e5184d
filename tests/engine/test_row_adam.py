"""Rows of several runs in one table take the path that torch's Adam takes with each run alone."""

import pytest
import torch

from scarcade.engine.optim import OptimConfig
from scarcade.engine.row_adam import Moments, update_


def drawn(*words: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(word * 1000**i for i, word in enumerate(words)))
    return torch.randn(2, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.04])
def test_each_run_is_as_torch_has_it(decay: float) -> None:
    config = OptimConfig(weight_decay=decay)
    late, rates = 3, [1e-3, 2e-2]  # the second run begins three steps after the first, at a rate of its own
    alone = [torch.nn.Parameter(drawn(run)) for run in range(2)]
    optimisers = [
        torch.optim.Adam([p], lr=rate, eps=config.eps, weight_decay=decay) for p, rate in zip(alone, rates, strict=True)
    ]
    for run, steps in ((0, range(8)), (1, range(late, 8))):
        for step in steps:
            alone[run].grad = drawn(run, step + 1)
            optimisers[run].step()

    rows, moments = drawn(0), Moments.of(drawn(0))
    for step in range(8):
        runs = [0] if step < late else [0, 1]
        if step == late:
            rows = torch.cat([rows, drawn(1)])
            empty = Moments.of(drawn(1))
            moments = Moments(
                torch.cat([moments.first_RH, empty.first_RH]), torch.cat([moments.second_RH, empty.second_RH])
            )
        gradient = torch.cat([drawn(run, step + 1) for run in runs])
        owner = torch.repeat_interleave(torch.tensor(runs), 2)
        taken = [step + 1, step + 1 - late][: len(runs)]
        update_(rows, gradient, moments, owner, taken, rates[: len(runs)], config)
    torch.testing.assert_close(rows, torch.cat([p.detach() for p in alone]), rtol=1e-12, atol=1e-12)


def test_a_row_has_the_same_bits_wherever_it_stands() -> None:
    config = OptimConfig(weight_decay=1e-3)
    table = torch.randn(37, 13, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(37, 13, generator=torch.Generator().manual_seed(1))
    whole, moments = table.clone(), Moments.of(table)
    for step in (1, 2, 3):
        update_(whole, gradient, moments, torch.zeros(37, dtype=torch.int64), [step], [1e-2], config)
    for first, last in ((0, 1), (5, 18), (36, 37)):
        part, of_part = table[first:last].clone(), Moments.of(table[first:last])
        owner = torch.zeros(last - first, dtype=torch.int64)
        for step in (1, 2, 3):
            update_(part, gradient[first:last], of_part, owner, [step], [1e-2], config)
        assert torch.equal(part, whole[first:last])
