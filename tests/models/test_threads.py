from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

from scarcade.models.threads import Body, _of_torch, pool, run, team

On = Callable[[Body, int], None]


@pytest.fixture(params=[team, pool])
def on(request: pytest.FixtureRequest) -> Iterator[On]:
    """Both ways; the number of threads is put back after."""
    if request.param is team and _of_torch() is None:
        pytest.skip("torch brings no libgomp here")
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


def test_rows_are_dealt_once(on: On) -> None:
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        for n in (1, 31, 32, 33, 64, 100, 1000):
            seen: list[tuple[int, int]] = []
            run(n, lambda a, b, seen=seen: seen.append((a, b)), on=on)  # type: ignore[misc]
            seen.sort()
            assert seen[0][0] == 0
            assert seen[-1][1] == n
            assert all(a[1] == b[0] for a, b in pairwise(seen))


def test_a_failure_in_a_thread_is_raised(on: On) -> None:
    def work(start: int, stop: int) -> None:
        if start > 0:
            raise ValueError("in a helper")

    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="in a helper"):
        run(100, work, on=on)


def test_products_of_torch_between(on: On) -> None:
    """The team is lent: what torch computes before and after is right."""
    torch.set_num_threads(2)
    x = torch.arange(300.0 * 300).view(300, 300) / 1e4
    wanted = (x.double() @ x.double()).float()
    for _ in range(20):
        seen: list[int] = []
        run(200, lambda a, b, seen=seen: seen.extend(range(a, b)), on=on)  # type: ignore[misc]
        assert sorted(seen) == list(range(200))
        torch.testing.assert_close(x @ x, wanted)
