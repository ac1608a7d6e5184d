import errno
import time

import pytest

from scarcade.engine.errors import StorageError
from scarcade.engine.patience import Patience, pause


def failing(times: int, error: Exception, found: str = "found") -> "list[Exception | str]":
    return [*[error] * times, found]


def answer(answers: "list[Exception | str]") -> str:
    one = answers.pop(0)
    if isinstance(one, Exception):
        raise one
    return one


def test_what_fails_a_few_times_is_found_and_counted() -> None:
    patience, answers = Patience((OSError,)), failing(3, OSError("HTTP status 503"))
    assert patience.tried(lambda: answer(answers), "s3://b/x") == "found"
    assert patience.retried == 3


def test_pauses_double_to_a_limit_and_are_spread() -> None:
    for attempt, longest in ((1, 0.1), (2, 0.2), (5, 1.6), (20, 8.0)):
        drawn = {pause(attempt) for _ in range(50)}
        assert longest / 2 <= min(drawn) <= max(drawn) <= longest
        assert len(drawn) > 10


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("AWS Error ACCESS_DENIED"), "s3://b/x: the store refuses .*AWS_ACCESS_KEY_ID"),
        (OSError(errno.ENOSPC, "no space"), "s3://b/x: the disk is full"),
    ],
)
def test_what_no_other_try_would_change_is_told_at_once(error: OSError, message: str) -> None:
    patience, answers = Patience((OSError,)), failing(5, error)
    with pytest.raises(StorageError, match=message):
        patience.tried(lambda: answer(answers), "s3://b/x")
    assert patience.retried == 0


def test_a_file_that_is_not_there_is_an_answer() -> None:
    with pytest.raises(FileNotFoundError):
        Patience((OSError,)).tried(lambda: answer([FileNotFoundError("x")]), "s3://b/x")


def test_a_stranger_is_given_up_after_seconds_and_tries_are_counted() -> None:
    began = time.monotonic()
    patience = Patience((OSError,))
    with pytest.raises(StorageError, match=r"did not answer after \d tries .*check the address"):
        patience.tried(lambda: answer(failing(1, OSError("timeout"))), "s3://b/x")
    # Pauses that double have passed four seconds by the eighth try at the latest, however late a busy machine wakes us.
    assert time.monotonic() - began > 3
    assert patience.retried < 8
    with pytest.raises(StorageError, match="after 2 tries"):
        Patience((OSError,), 2).tried(lambda: answer(failing(1, OSError("timeout"))), "s3://b/x")
