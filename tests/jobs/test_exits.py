"""Exit codes and messages."""

import errno
import os

import pytest

from scarcade.engine import errors
from scarcade.jobs.exits import Terminated, explained


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (errors.UsageError("--x: no"), 2, "--x: no"),
        (errors.PartialError("some"), 3, "some"),
        (errors.CorruptError("flipped"), 4, "flipped"),
        (errors.BusyError("another"), 5, "another"),
        (KeyboardInterrupt(), 130, "same command continues"),
        (Terminated(), 143, "same command continues"),
        (MemoryError(), 5, "--batch-size"),
        (OutOfMemoryError("CUDA"), 5, "--batch-size"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x"), 5, "out/x: the disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.h5ad"), 4, "a.h5ad: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "a.h5ad"), 5, "a.h5ad: Permission denied"),
        (KeyError("x"), 1, "bug of ours"),
        (errors.ScarcadeError("bare"), 1, "bare"),
    ],
)
def test_every_error_has_its_code_and_a_message(error: BaseException, code: int, told: str) -> None:
    found, message = explained(error)
    assert found == code
    assert told in message
