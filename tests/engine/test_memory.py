"""Sizes of memory as people write them; a process that is held to a limit raises and lives on."""

import subprocess
import sys

import pytest
import torch

from scarcade.engine.errors import LimitError
from scarcade.engine.memory import bytes_of, ran_out, size_text


def test_sizes_are_read_and_told() -> None:
    assert [bytes_of(text) for text in ("4GB", "1.5 GiB", "800mb", "2g", "77")] == [
        4 * 10**9,
        3 << 29,
        800 * 10**6,
        2 * 10**9,
        77,
    ]
    assert [size_text(n) for n in (4e9, 1.54e9, 8e8, 3)] == ["4.0 GB", "1.5 GB", "800 MB", "1 MB"]
    for wrong in ("", "four", "4 parsecs", "-1GB", "GB"):
        with pytest.raises(ValueError, match="wanted a size like 4GB"):
            bytes_of(wrong)


HELD = """
import numpy as np, torch
from scarcade.engine.memory import hold_to, ran_out, _held
hold_to(_held()[1] + (100 << 20))
for make in (lambda: np.ones(20 << 20), lambda: torch.ones(40 << 20), lambda: bytearray(160 << 20)):
    try:
        make()
        print("made")
    except Exception as error:
        print(ran_out(error))
print(len(np.ones(4 << 20)))
hold_to(None)
print(len(np.ones(20 << 20)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's account of memory is Linux's")
def test_a_process_held_to_a_limit_raises_and_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True", "True", "True", str(4 << 20), str(20 << 20)]


def test_an_error_of_ours_that_was_raised_for_want_of_memory_is_one() -> None:
    with pytest.raises(LimitError) as raised:
        try:
            raise MemoryError("9 MiB")
        except MemoryError as error:
            raise LimitError("a.h5ad: obs: is too large to be read") from error
    assert ran_out(raised.value)
    assert not ran_out(LimitError("a.h5ad: too large"))


def test_other_errors_are_not_for_want_of_memory() -> None:
    assert ran_out(MemoryError())
    with pytest.raises(RuntimeError) as raised:
        torch.ones(1 << 60)
    assert ran_out(raised.value)
    assert not ran_out(RuntimeError("a bug"))
    assert not ran_out(ValueError("can't allocate memory"))
