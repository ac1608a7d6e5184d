import threading
import time
from collections.abc import Iterator

import pytest

from scarcade.dataloaders.prefetch import Prefetch


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
