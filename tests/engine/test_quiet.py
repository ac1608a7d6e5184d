"""Filters of warnings are as they were, however many threads were quiet at once."""

import threading
import time
import warnings

import pytest

from scarcade.engine.quiet import quiet


def test_nothing_is_told_within_and_everything_after() -> None:
    with quiet():
        warnings.warn("not for users", UserWarning, stacklevel=1)
        with quiet():  # within each other, too
            warnings.warn("nor this", UserWarning, stacklevel=1)
    with pytest.raises(UserWarning):
        warnings.warn("for users", UserWarning, stacklevel=1)


def test_threads_leave_the_filters_as_they_were() -> None:
    before = list(warnings.filters)

    def work(seconds: float) -> None:
        for _ in range(5):
            with quiet():
                time.sleep(seconds)

    threads = [threading.Thread(target=work, args=(0.001 * i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
