"""A GPU draws the numbers of a CPU; without a GPU by Triton's interpreter."""

import pytest
import torch

from scarcade.engine.streams import CountedStreams, GpuStreams
from tests.gpu import DEVICE, needs_triton

pytestmark = needs_triton
SEEDS = [(3, 5, lane) for lane in range(5)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [(3, 7, 1, 0, 12), (0, 0, 0, 0, 1), (40, 40, 40, 40, 39)])
@pytest.mark.parametrize("width", [(), (1,), (10,), (7, 5)])
def test_numbers_are_those_of_a_cpu(sizes: tuple[int, ...], width: tuple[int, ...]) -> None:
    here, there = CountedStreams(SEEDS, sizes, CPU), GpuStreams(SEEDS, sizes, DEVICE)
    for _ in range(3):  # each draw has other numbers
        shape = (sum(sizes), *width)
        uniform = there.fill("uniform", torch.empty(shape, device=DEVICE)).cpu()
        assert torch.equal(uniform, here.fill("uniform", torch.empty(shape)))
        normal = there.fill("normal", torch.empty(shape, device=DEVICE)).cpu()
        torch.testing.assert_close(normal, here.fill("normal", torch.empty(shape)), rtol=1e-5, atol=2e-6)


def test_without_cells_there_are_no_numbers() -> None:
    there = GpuStreams([(1, 2)], [0], DEVICE)
    assert there.fill("normal", torch.empty(0, 4, device=DEVICE)).shape == (0, 4)
