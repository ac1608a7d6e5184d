"""Warnings of other libraries kept from the user, in a process of several threads.

Python's filters belong to the process. Two threads that each put theirs aside and back, one within the other's time,
would leave the wrong ones behind for good; so one at a time does.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_ONE = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """No warning is shown or raised within the block, which no other thread enters meanwhile."""
    with _ONE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
