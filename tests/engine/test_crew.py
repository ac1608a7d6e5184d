"""Threads that compute without the interpreter: what they do, in which order, and how they end."""

import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from scarcade.engine import crew
from scarcade.engine.addresses import numbers_at
from scarcade.engine.crew import PHASES, Crew, crew_of, meet

pytestmark = pytest.mark.skipif(not crew.can_be_had(), reason="no semaphores of Linux here")
CREW, N, ROUNDS, SEEN = range(4)
MOST = 5  # threads


def _meeting(record_at, thread) -> None:  # type: ignore[no-untyped-def]
    """In each phase a thread says that it is there, and then looks whether all are: if not, `SEEN` is negative."""
    record = numbers_at(record_at, SEEN + MOST * PHASES + MOST)
    n = record[N]
    for phase in range(PHASES):
        for _ in range(record[ROUNDS] * (thread + 1)):  # each takes another time
            record[SEEN + MOST * PHASES + thread] += 1
        record[SEEN + phase * MOST + thread] = 1
        meet(record[CREW], phase, thread)
        for other in range(n):
            if record[SEEN + phase * MOST + other] == 0:
                record[SEEN] = -1000


def _lagging(record_at, thread) -> None:  # type: ignore[no-untyped-def]
    """The first thread has nothing to do."""
    record = numbers_at(record_at, 2)
    if thread > 0:
        total = 0
        for i in range(record[0]):
            total += i % 7
        record[1] = total


def record_of(crew_: Crew, rounds: int) -> np.ndarray:
    record = np.zeros(SEEN + MOST * PHASES + MOST, np.int64)
    record[[CREW, N, ROUNDS]] = crew_.address, crew_.n, rounds
    return record


@pytest.mark.parametrize("n", [1, 2, 3, MOST])
def test_all_are_there_when_a_phase_ends(n: int) -> None:
    made = Crew(n)
    for rounds in (0, 1, 1000, 100_000):
        record = record_of(made, rounds)
        made.begin(_meeting, record, None)
        made.join()
        assert record[SEEN] == 1
        seen = record[SEEN : SEEN + MOST * PHASES].reshape(PHASES, MOST)
        assert (seen[:, :n] == 1).all()
        assert not seen[:, n:].any()
        assert record[SEEN + MOST * PHASES :][:n].tolist() == [PHASES * rounds * (t + 1) for t in range(n)]


def test_a_job_goes_on_when_this_thread_has_done_its_part() -> None:
    made, record, n = Crew(2), np.zeros(2, np.int64), 100_000_000
    returned = []
    for _ in range(5):  # this thread may lose its core for as long as that takes
        record[:] = n, 0
        made.begin(_lagging, record, None)
        returned.append(record[1] == 0)
        made.join()
        whole, rest = divmod(n, 7)
        assert record[1] == whole * 21 + rest * (rest - 1) // 2
        if returned[-1]:
            break
    assert any(returned)


def test_a_job_waits_for_the_one_before() -> None:
    made = Crew(2)
    first, second = np.array([50_000_000, 0]), np.array([7, 0])
    made.begin(_lagging, first, None)
    made.begin(_lagging, second, None)
    assert first[1] > 0
    made.join()
    assert second[1] == 21
    made.join()  # nothing to wait for


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.05])
def test_announcing_a_job_does_it_once(pause: float) -> None:
    made = Crew(3)
    for _ in range(20):
        record = record_of(made, 1)
        made.wake()
        made.wake()
        time.sleep(pause)
        made.begin(_meeting, record, None)
        made.join()
        assert record[SEEN + MOST * PHASES :][:3].tolist() == [PHASES * (t + 1) for t in range(3)]


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("crew-")}


def _end(threads: set[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(2)
    return not any(thread.is_alive() for thread in threads)


def test_the_threads_end_with_the_crew() -> None:
    before = _threads()
    made = Crew(3)
    made.begin(_lagging, np.array([1000, 0]), None)
    own = _threads() - before
    assert len(own) == 2
    del made
    gc.collect()
    assert _end(own)


def test_crews_of_several_sizes_stay() -> None:
    two, three = crew_of(2), crew_of(3)
    assert crew_of(2) is two
    assert crew_of(3) is three
    record = np.array([20_000_000, 0])
    three.begin(_lagging, record, None)
    crew_of(2)  # which may be given memory that the others worked in
    assert record[1] > 0


def test_each_thread_has_its_own_and_it_ends_with_it() -> None:
    mine, found = crew_of(2), []
    assert crew_of(2) is mine
    before, own = _threads(), set()

    def other() -> None:
        found.append(crew_of(2) is not mine)
        own.update(_threads() - before)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert (found, len(own)) == ([True], 1)
    assert _end(own)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_a_crew_of_its_own() -> None:
    code = (
        "import os, sys, numpy as np, tests.engine.test_crew as t\n"
        "from scarcade.engine.crew import crew_of\n"
        "def once():\n"
        "    record = t.record_of(crew_of(2), 3)\n"
        "    crew_of(2).begin(t._meeting, record, None)\n"
        "    crew_of(2).join()\n"
        "    return record[t.SEEN] == 1\n"
        "assert once()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if once() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert once()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.long
def test_no_interrupt_leaves_a_thread_waiting() -> None:
    """Signals at random moments: a job that had begun on one thread only would never end."""
    code = (
        "import random, signal, tests.engine.test_crew as t\n"
        "from scarcade.engine.crew import crew_of\n"
        "made = crew_of(2)\n"
        "made.begin(t._meeting, t.record_of(made, 20), None)\n"  # compiled: numba does not bear an interrupt
        "def stop(*_):\n"
        "    raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGALRM, stop)\n"
        "raised = 0\n"
        "for i in range(3000):\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 4e-4))\n"
        "        while True:\n"
        "            made.wake()\n"
        "            made.begin(t._meeting, t.record_of(made, 20), None)\n"
        "            made.join()\n"
        "    except KeyboardInterrupt:\n"
        "        raised += 1\n"
        "print(raised)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert (found.stderr, found.stdout.split()) == ("", ["3000"])
