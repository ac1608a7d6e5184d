"""Sums of workers on one machine through memory that they share."""

import itertools
import multiprocessing as mp
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scarcade.engine import shared_flags, shared_sum
from scarcade.engine.gradients import GradientSum
from scarcade.engine.shared_sum import SharedSums
from scarcade.engine.world import World, gathered, use_threads
from tests.engine.workers import on_workers

PARTS = [(1000, torch.float32), (7, torch.float32), (33, torch.float64)]


def numbers(rank: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(n, generator=generator, dtype=kind) for n, kind in PARTS]


def summed(world: World, slow: int) -> dict[str, Any]:
    """Sums of twenty steps, in which one worker is late; and those over the process group."""
    sums = world.shared_sums(PARTS)
    assert sums is not None
    found: list[list[np.ndarray]] = []
    outs = [torch.empty(n, dtype=kind) for n, kind in PARTS]
    for step in range(20):
        for number, (buffer, own) in enumerate(zip(sums.buffers(sums.turn), numbers(world.rank, step), strict=True)):
            if world.rank == slow:
                time.sleep(0.002)
            buffer.copy_(own)
            sums.send(number)
        for number, out in enumerate(outs):
            sums.finish(number, out)
        sums.next_step()
        found.append([out.numpy().copy() for out in outs])
    group = [[world.sum(one).numpy() for one in numbers(world.rank, step)] for step in range(20)]
    sums.close()
    del sums, buffer
    return {"found": found, "group": group, "maps": Path("/proc/self/maps").read_text()}


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_every_worker_has_the_sum_in_the_order_of_the_ranks(size: int, tmp_path: Path) -> None:
    runs = on_workers(size, tmp_path, summed, size - 1)
    for step in range(20):
        expected = numbers(0, step)
        for rank in range(1, size):
            expected = [a + b for a, b in zip(expected, numbers(rank, step), strict=True)]
        for run in runs:
            for found, wanted, group in zip(run["found"][step], expected, run["group"][step], strict=True):
                assert np.array_equal(found, wanted.numpy())
                np.testing.assert_allclose(found, group, rtol=1e-5, atol=1e-6)
                assert size > 2 or np.array_equal(found, group)
    assert not any("scarcade-sums" in run["maps"] for run in runs)  # nothing is left


def refused(world: World) -> list[bool]:
    """Whether there are no sums: one worker alone has no memory, then all have too much to share."""
    opened = shared_sum._opened
    found = []
    if world.rank == 1:
        shared_sum._opened = lambda said, total: None
    found.append(world.shared_sums(PARTS) is None)
    shared_sum._opened = opened
    if world.rank == 1:
        shared_sum._opened = lambda said, total: opened({**said, "token": "0" * shared_sum._TOKEN}, total)
    found.append(world.shared_sums(PARTS) is None)  # the memory of somebody else
    shared_sum._opened = opened
    found.append(world.shared_sums([(shared_sum.MOST // 8, torch.float32)]) is None)
    found.append(world.shared_sums(PARTS) is not None)
    return found


def test_all_or_none_share(tmp_path: Path) -> None:
    assert on_workers(2, tmp_path, refused) == [[True] * 4] * 2
    assert World().shared_sums(PARTS) is None


def _work(rank: int, meeting: str, results: Any, end: str) -> None:
    use_threads(1)
    with gathered(rank, 2, Path(meeting)) as world:
        sums = world.shared_sums(PARTS)
        assert sums is not None
        if rank == 1:
            results.put(("ready", 0.0))
            time.sleep(0.5)  # the other waits
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            world.leave()
            time.sleep(20)
        sums.send(0)
        began = time.monotonic()
        try:
            sums.finish(0, torch.empty(PARTS[0][0]))
        except RuntimeError as error:
            results.put((str(error), time.monotonic() - began))


@pytest.mark.long
@pytest.mark.parametrize("end", ["killed", "left"])
def test_who_waits_for_a_worker_that_goes_fails_at_once(end: str, tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_work, args=(rank, str(tmp_path / "meeting"), results, end), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert results.get(timeout=60)[0] == "ready"
        said, waited_s = results.get(timeout=30)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert said == "worker 1 is gone, and its gradients are waited for"
    assert waited_s < 15


def test_a_worker_that_came_before_it_left_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _pair()
    for sums in (first, second):
        sums.send(0)
    second.close()
    late, too_early = shared_flags.late, iter([1])

    def looked(flags: np.ndarray, place: int, *rest: int) -> int:
        """The first look comes before the other worker."""
        return place + 1 if next(too_early, None) else int(late(flags, place, *rest))

    monkeypatch.setattr(shared_flags, "late", looked)
    first._wait(first._place(0, 0))
    shared_flags.tell(first._flags, first._place(0, 1), 1)
    with pytest.raises(RuntimeError, match="worker 1 is gone"):
        first._wait(first._place(0, 1))


def test_a_worker_that_lives_and_does_nothing_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_sum, "_PATIENCE_S", 0.3)
    first, _second = _pair()
    first.send(0)
    with pytest.raises(RuntimeError, match="worker 1 has not answered"):
        first.finish(0, torch.empty(PARTS[0][0]))


def test_time_in_which_the_process_was_stopped_is_not_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was asleep for an hour: the others were, too, and get their time."""
    first, second = _pair()
    first.send(0)
    looks = itertools.count()

    def monotonic() -> float:
        return time.monotonic() + 3600 * (next(looks) > 20)

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if next(looks) > 40:
            second.send(0)

    monkeypatch.setattr(shared_sum, "time", SimpleNamespace(monotonic=monotonic, sleep=sleep))
    monkeypatch.setattr(shared_sum, "_AWAKE_S", 0.0)
    monkeypatch.setattr(shared_sum, "_PATIENCE_S", 60.0)
    first._wait(first._place(0, 0))
    assert next(looks) > 40


def _pair() -> tuple[SharedSums, SharedSums]:
    """Both workers' views of one memory, in this process."""
    _, total = shared_sum._places(PARTS, 2)
    memory, said = shared_sum._made(total)
    assert memory is not None
    other = shared_sum._opened(said, total)
    assert other is not None
    os.close(int(said["handle"]))
    pids = [os.getpid()] * 2
    return SharedSums(memory, pids, 0, PARTS), SharedSums(other, pids, 1, PARTS)


def unclosed(world: World) -> int:
    """How many mappings are left of sums that a failing start made, and nobody closed."""
    for _ in range(5):
        gradients = GradientSum(nn.Linear(300, 300), world, 1)
        assert isinstance(gradients._sums, SharedSums)
        del gradients
    return Path("/proc/self/maps").read_text().count("scarcade-sums")


@pytest.mark.long
def test_what_nobody_closes_goes_with_its_model(tmp_path: Path) -> None:
    assert on_workers(2, tmp_path, unclosed) == [0, 0]


def without_memory(world: World) -> bool:
    def forbidden(name: str, flags: int = 0) -> int:
        raise PermissionError(1, "Operation not permitted")

    os.memfd_create = forbidden
    return world.shared_sums(PARTS) is None


def test_where_such_memory_is_forbidden_none_share(tmp_path: Path) -> None:
    assert on_workers(2, tmp_path, without_memory) == [True, True]


def with_an_empty_parameter(world: World) -> list[float]:
    model = nn.ParameterList(
        [nn.Parameter(torch.ones(n, dtype=kind)) for n, kind in ((3, torch.float32), (0, torch.float64))]
    )
    gradients = GradientSum(model, world, 1)
    sum(p.float().sum() for p in model).backward()
    found = gradients.finish(torch.ones(1), 0.5).tolist()
    return [*found, *model[0].grad.tolist()]


@pytest.mark.long
def test_a_parameter_without_numbers_is_no_obstacle(tmp_path: Path) -> None:
    assert on_workers(2, tmp_path, with_an_empty_parameter) == [[2.0] * 4] * 2
