"""Turns Ctrl-C and SIGTERM into a question that the training loop asks, so that it stops between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Which signal came, if one did."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    def pass_on(self) -> None:
        """Deliver the signal that was held back, to whoever handled it before; call it after the block."""
        if self.signal is not None:
            signal.raise_signal(self.signal)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Handlers are after the block what they were before: `ray.init` takes SIGTERM for itself."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Within the block the first signal is remembered and the second ends the process as usual.

    Away from the main thread, where no handler can be set, signals go where they always went.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def remember(number: int, _: FrameType | None) -> None:
        interrupts.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, remember)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
