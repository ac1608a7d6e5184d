import threading
import time
from collections.abc import Callable, Iterator

import pytest

from scarcade.dataloaders.prefetch import Prefetch, SideBySide


def threads() -> int:
    return sum(thread.name == "scarcade-prefetch" for thread in threading.enumerate())


def test_items_come_in_order_and_the_thread_ends() -> None:
    assert list(Prefetch(iter(range(100)))) == list(range(100))
    assert threads() == 0


@pytest.mark.parametrize("ahead", [1, 3])
def test_it_runs_no_further_ahead_than_told(ahead: int) -> None:
    made = []

    def source() -> Iterator[int]:
        for item in range(20):
            made.append(item)
            yield item

    items = Prefetch(source(), ahead)
    for item in range(10):
        time.sleep(0.005)
        assert len(made) <= item + ahead
        assert next(items) == item
    items.close()
    assert threads() == 0


def test_by_hand_it_waits_until_it_is_told() -> None:
    made = []

    def source() -> Iterator[int]:
        for item in range(5):
            made.append(item)
            yield item

    items = Prefetch(source(), manual=True)
    assert next(items) == 0
    time.sleep(0.01)
    assert made == [0]
    items.proceed()
    assert next(items) == 1
    items.close()
    assert threads() == 0


def test_an_error_is_raised_where_the_item_was_wanted() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("on disk")

    items = Prefetch(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="on disk"):
        next(items)
    assert threads() == 0
    with pytest.raises(StopIteration):
        next(items)


def test_closing_stops_a_thread_that_waits_for_room() -> None:
    items = Prefetch(iter(range(10)))
    time.sleep(0.01)
    items.close()
    assert threads() == 0
    assert list(items) == []


def test_what_was_taken_is_not_held() -> None:
    class Item:
        alive = 0

        def __init__(self) -> None:
            Item.alive += 1

        def __del__(self) -> None:
            Item.alive -= 1

    items = Prefetch(Item() for _ in range(5))
    for _ in items:
        time.sleep(0.002)
        assert Item.alive <= 3  # the one before, this one, the next
    assert Item.alive <= 1


def test_waiting_is_measured() -> None:
    def source() -> Iterator[int]:
        for item in range(3):
            time.sleep(0.02)
            yield item

    items = Prefetch(source())
    list(items)
    assert items.waited > 0.04


@pytest.mark.parametrize("n", [1, 2, 3])
def test_results_come_in_order_and_as_many_are_made_at_a_time_as_told(n: int) -> None:
    lock, running, most, begun = threading.Lock(), 0, 0, []

    def call(item: int) -> int:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
            begun.append(item)
        time.sleep(0.002 * (1 + item % 2))
        with lock:
            running -= 1
        return item

    def calls() -> Iterator[Callable[[], int]]:
        for item in range(20):
            yield lambda item=item: call(item)  # type: ignore[misc]

    side_by_side: SideBySide[int] = SideBySide(n)
    for _ in range(2):
        found = []
        for item in side_by_side.results(calls()):
            assert len(begun) <= item + n  # none is begun before one is wanted
            found.append(item)
        assert found == list(range(20))
        begun.clear()
    assert most == n


@pytest.mark.parametrize("n", [1, 2])
def test_what_a_call_raises_is_raised_where_its_result_is_wanted(n: int) -> None:
    def broken() -> int:
        raise ValueError("on disk")

    side_by_side: SideBySide[int] = SideBySide(n)
    results = side_by_side.results(iter([lambda: 0, lambda: 1, broken, lambda: 3]))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="on disk"):
        next(results)
    assert list(side_by_side.results(iter([lambda: 4, lambda: 5]))) == [4, 5]


def test_whoever_closes_waits_for_what_is_being_made() -> None:
    ended = []

    def slow() -> int:
        time.sleep(0.02)
        ended.append(1)
        return 0

    side_by_side: SideBySide[int] = SideBySide(2)
    results = side_by_side.results(iter([slow] * 10))
    next(results)
    results.close()  # type: ignore[attr-defined]
    n = len(ended)
    time.sleep(0.05)
    assert len(ended) == n < 5
