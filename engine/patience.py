"""Asking a store again that failed: how often, after which pauses, and when not at all.

Pauses double from a tenth of a second to eight, and are spread at random, so that workers that were refused together do
not come back together. A store that has never answered is given up after seconds: its address is wrong more often than
it is down. One that has answered before is asked for most of a minute.
"""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from scarcade.engine.errors import StorageError

T = TypeVar("T")

TRIES = 12
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 8.0
_STRANGER_S = 4.0  # for a store that has not answered yet
_SPREAD = random.SystemRandom()  # not the generator of the process, which is a user's
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (  # what trying again does not change, as the libraries of the stores word it
    *("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN"),
    *("MISSING_AUTHENTICATION_TOKEN", "UNRECOGNIZED_CLIENT", "NO_SUCH_BUCKET", "PERMISSION_DENIED", "HTTP status 403"),
    *("HTTP status 401", "does not exist", "Credential", "credentials"),
)


def pause(attempt: int) -> float:
    """Seconds to wait before try number `attempt` (from 1): between half of a doubling length and all of it."""
    length: float = min(_FIRST_PAUSE_S * 2.0 ** (attempt - 1), _LONGEST_PAUSE_S)
    return length * _SPREAD.uniform(0.5, 1.0)


class Patience:
    """With one store. Safe to use from several threads."""

    def __init__(self, failures: tuple[type[Exception], ...], tries: int = TRIES) -> None:
        self.retried = 0  # requests that were made again
        self._failures, self._tries = failures, tries
        self._known = False  # whether the store has ever answered

    def tried(self, action: Callable[[], T], where: str) -> T:
        """What `action` returns, tried again if it fails.

        Raises:
            StorageError: after the last try, or at once where no other try would help; names `where`.
            FileNotFoundError: as `action` does; that is an answer.
        """
        began, attempt = time.monotonic(), 0
        while True:
            try:
                found = action()
                self._known = True
                return found
            except FileNotFoundError:
                self._known = True
                raise
            except self._failures as error:
                attempt += 1
                if getattr(error, "errno", None) in _FULL:
                    raise StorageError(f"{where}: the disk is full; free some space") from error
                if any(word in str(error) for word in _REFUSED):
                    raise StorageError(
                        f"{where}: the store refuses ({error}); check the name of the bucket and the "
                        "credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your store)"
                    ) from error
                given_up = not self._known and time.monotonic() - began > _STRANGER_S
                if attempt == self._tries or given_up:
                    hint = (
                        "" if self._known else "; check the address (endpoint_override, AWS_ENDPOINT_URL) and network"
                    )
                    raise StorageError(
                        f"{where}: the store did not answer after {attempt} tries ({error}){hint}"
                    ) from error
            self.retried += 1
            time.sleep(pause(attempt))
