"""Ranges of far files that were told ahead: any part of them is taken, and each byte comes once."""

from concurrent.futures import Future

import numpy as np
import pytest

from scarcade.dataloaders.coming import Coming

FILE = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8).tobytes()


class Store:
    """Answers at once, and counts."""

    def __init__(self, coming: Coming) -> None:
        self.coming, self.asked = coming, 0

    def tell(self, offset: int, n_bytes: int, error: Exception | None = None) -> None:
        def fetch() -> "Future[bytes]":
            future: Future[bytes] = Future()
            if error is not None:
                future.set_exception(error)
            else:
                self.asked += n_bytes
                future.set_result(FILE[offset : offset + n_bytes])
            return future

        self.coming.tell("a", offset, n_bytes, fetch)

    def read(self, offset: int, n_bytes: int) -> list[tuple[int, int]]:
        """The parts that had to be read; all bytes are right."""
        out = bytearray(n_bytes)
        gaps = self.coming.take("a", offset, memoryview(out))
        for start, stop in gaps:
            assert not any(out[start:stop])  # not touched
            out[start:stop] = FILE[offset + start : offset + stop]
        assert bytes(out) == FILE[offset : offset + n_bytes]
        return gaps


@pytest.fixture
def store() -> Store:
    return Store(Coming())


def test_a_range_is_read_in_other_parts_than_it_was_told(store: Store) -> None:
    store.tell(100, 300)
    for offset, n_bytes in ((100, 70), (170, 200), (370, 30)):
        assert store.read(offset, n_bytes) == []
    assert len(store.coming) == 0
    assert store.read(100, 10) == [(0, 10)]  # it was let go


def test_one_reading_takes_from_several_ranges_and_asks_for_what_lies_between(store: Store) -> None:
    store.tell(300, 50)
    store.tell(100, 50)
    store.tell(400, 100)
    assert store.read(90, 500) == [(0, 10), (60, 210), (260, 310), (410, 500)]
    assert len(store.coming) == 0


def test_what_is_on_its_way_is_not_asked_for_again(store: Store) -> None:
    store.tell(0, 500)
    store.tell(0, 500)
    store.tell(100, 50)
    assert store.asked == 500
    store.tell(400, 200)  # a part of it is new
    assert store.asked == 700
    assert store.read(0, 600) == []
    assert len(store.coming) == 1  # whose first half came twice, until its window is over
    for _ in range(3):
        store.coming.next_turn()
    assert len(store.coming) == 0


def test_what_nobody_reads_is_forgotten_after_three_windows(store: Store) -> None:
    store.tell(0, 100)
    store.coming.next_turn()
    store.tell(200, 100)
    assert store.read(0, 40) == []
    store.coming.next_turn()
    assert store.read(40, 10) == []
    store.coming.next_turn()
    assert store.read(50, 10) == [(0, 10)]
    assert store.read(200, 100) == []


def test_a_failure_is_the_readers_who_may_try_again(store: Store) -> None:
    store.tell(0, 100, OSError("no route"))
    with pytest.raises(OSError, match="no route"):
        store.read(50, 10)
    assert store.read(50, 10) == [(0, 10)]
    assert len(store.coming) == 0
