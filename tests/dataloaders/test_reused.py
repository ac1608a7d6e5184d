"""Memory is used again when nobody can see what was in it, and not before."""

import gc
import threading

import numpy as np
import pytest

from scarcade.dataloaders import reused
from scarcade.dataloaders.reused import empty, reusing

N = 1 << 20


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_comes_back_when_the_last_view_is_gone() -> None:
    with reusing():
        first = empty(N, np.uint16)
        assert first.dtype == np.uint16
        assert first.shape == (N,)
        assert first.flags.aligned
        assert first.flags.writeable
        first[:] = 7
        view, place = first[10:20], _address(first)
        del first
        other = empty(N, np.uint16)
        assert _address(other) != place
        other[:] = 0
        assert (view == 7).all()
        del view
        again = empty(N // 2, np.float32)  # another type, as many bytes
        assert _address(again) == place
        assert _address(empty(N, np.uint16)) != place


def test_memory_that_is_much_too_large_is_left_for_others() -> None:
    with reusing():
        place = _address(empty(8 * N, np.uint8))
        assert _address(empty(N, np.uint8)) != place
        assert _address(empty(8 * N, np.uint8)) == place


def test_nothing_is_kept_beyond_its_use() -> None:
    with reusing():
        held = empty(N, np.uint32)
        with reusing():
            del held
        assert reused._free  # the outer one still runs
        late = empty(N, np.uint32)
    assert not reused._free
    del late
    assert not reused._free
    assert empty(N, np.uint32).base is None  # as numpy makes it


def test_what_is_kept_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reused, "_MOST", 3 * N)
    with reusing():
        many = [empty(N, np.uint8) for _ in range(10)]
        many.clear()
        assert 0 < sum(one.nbytes for one in reused._free) <= 3 * N


def test_threads_never_share_memory() -> None:
    wrong: list[int] = []

    def work(own: int) -> None:
        rng = np.random.default_rng(own)
        for _ in range(200):
            some = [empty(int(rng.integers(N // 4, N)), np.int32) for _ in range(3)]
            for one in some:
                one[:: 1 << 10] = own
            wrong.extend(own for one in some if not (one[:: 1 << 10] == own).all())

    with reusing():
        threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    gc.collect()
    assert not wrong
