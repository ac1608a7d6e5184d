"""Rows dealt to threads: each once, and a failure in any of them is raised."""

import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from scarcade.engine import openmp
from scarcade.engine.pool import Body, _of_torch, pool, run, team

On = Callable[[Body, int], None]
no_team = pytest.mark.skipif(_of_torch() is None, reason="torch has no libgomp of its own here")
both = pytest.mark.parametrize("on", [pool, pytest.param(team, marks=no_team)])


@both
def test_rows_are_dealt_once(on: On) -> None:
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            for n in (1, 31, 32, 33, 64, 100, 1000):
                seen: list[tuple[int, int]] = []
                run(n, lambda a, b, seen=seen: seen.append((a, b)), on=on)  # type: ignore[misc]
                seen.sort()
                assert seen[0][0] == 0
                assert seen[-1][1] == n
                assert all(a[1] == b[0] for a, b in pairwise(seen))
    finally:
        torch.set_num_threads(before)


@both
def test_torch_computes_on_one_thread_there_and_on_all_again_after_it(on: On) -> None:
    before, product = torch.get_num_threads(), torch.eye(300)
    torch.set_num_threads(2)
    try:
        found: list[tuple[bool, int]] = []
        run(100, lambda a, b: found.append((torch.equal(product @ product, product), torch.get_num_threads())), on=on)
        assert [same for same, _ in found] == [True, True]
        if on is pool:  # within OpenMP's team torch tells the number that is outside of it
            assert [n for _, n in found] == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@no_team
def test_an_interrupt_between_c_and_python_is_raised_and_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    class Stopped(KeyboardInterrupt):
        """As SIGTERM is raised by the command line."""

    main, seen, before = threading.get_ident(), [], sys.unraisablehook

    def body() -> None:
        seen.append(threading.get_ident())
        if threading.get_ident() == main:
            raise Stopped

    with pytest.raises(Stopped):
        team(body, 2)
    assert len(set(seen)) == 2
    assert sys.unraisablehook is before
    assert capfd.readouterr().err == ""


@no_team
def test_what_python_tells_of_another_function_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    main, as_python_3_13 = threading.get_ident(), types.SimpleNamespace(object=None, err_msg="Exception ignored in <x>")

    def body() -> None:
        if threading.get_ident() == main:
            sys.unraisablehook(as_python_3_13)

    team(body, 2)
    assert told == [as_python_3_13]


@no_team
@pytest.mark.long
def test_no_interrupt_is_lost_or_printed_whenever_it_comes() -> None:
    code = (
        "import random, signal, torch\n"
        "from scarcade.engine.pool import run, team\n"
        "torch.set_num_threads(2)\n"
        "came, raised = [], 0\n"
        "def stop(*_):\n"
        "    came.append(1)\n"
        "    raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGALRM, stop)\n"
        "for _ in range(3000):\n"
        "    n = len(came)\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 4e-4))\n"
        "        while len(came) == n:\n"
        "            run(64, lambda start, stop: None, on=team)\n"
        "        print('lost')\n"
        "    except KeyboardInterrupt:\n"
        "        raised += 1\n"
        "print(raised, len(came))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert (found.stderr, found.stdout.split()) == ("", ["3000", "3000"])


@both
@pytest.mark.parametrize("whose", ["own", "another"])
def test_a_failure_in_a_thread_is_raised(on: On, whose: str) -> None:
    def work(start: int, stop: int) -> None:
        if (start == 0) == (whose == "own"):
            raise ValueError("in a thread")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="in a thread"):
            run(100, work, on=on)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "spins"), [(None, True), ("0", False), ("7", True)])
def test_openmp_looks_for_work_for_a_moment(given: str | None, spins: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {} if given is None else {"GOMP_SPINCOUNT": given}
    code = "import scarcade, os, sys; from scarcade.engine import openmp"
    code += "; print('torch' in sys.modules, openmp.spins, os.environ['GOMP_SPINCOUNT'])"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    assert found.stdout.split() == ["False", str(spins), given or openmp.MOMENT]


def test_openmp_sleeps_when_there_is_nothing_to_do() -> None:
    code = (
        "import scarcade, torch, time, resource; torch.set_num_threads(2); x = torch.ones(2000, 2000); x @ x\n"
        "used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])\n"
        "x.exp_(); began = used(); time.sleep(0.5); print(used() - began)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=60,
        env={name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"},
    )  # fmt: skip
    assert float(found.stdout) < 2e-3  # OpenMP's own default takes twice as long


def test_a_thread_keeps_to_one_whatever_another_asks_for_then() -> None:
    program = (
        "import threading, torch; from scarcade.engine.pool import _compute_alone\n"
        "torch.set_num_threads(2); began, asked = threading.Event(), threading.Event()\n"
        "def work():\n"
        "    _compute_alone(); began.set(); asked.wait()\n"
        "    torch.ones(3000, 3000).exp_(); print(torch.get_num_threads())\n"
        "thread = threading.Thread(target=work); thread.start()\n"
        "began.wait(); torch.set_num_threads(2); asked.set(); thread.join()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"
