import signal
import threading

import pytest

from scarcade.engine.interrupts import Interrupts, interruptible, kept_handlers


def test_the_first_signal_is_remembered_and_passed_on_after_the_block() -> None:
    with interruptible() as interrupts:
        assert not interrupts()
        signal.raise_signal(signal.SIGINT)
        assert interrupts()
    with pytest.raises(KeyboardInterrupt):
        interrupts.pass_on()


def test_the_second_signal_ends_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back() -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        with interruptible() as interrupts:
            signal.raise_signal(signal.SIGTERM)
        assert not seen
        interrupts.pass_on()
        assert seen == ["mine"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_who_takes_a_signal_for_himself_gives_it_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with kept_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before


def test_away_from_the_main_thread_nothing_is_touched() -> None:
    found: list[Interrupts] = []

    def inside() -> None:
        with interruptible() as interrupts:
            found.append(interrupts)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert not found[0]()
