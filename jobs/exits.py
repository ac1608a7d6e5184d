"""How a command ends: from whatever was raised to an exit code and one message that stands alone.

====  ==========================================================================
 0    done
 1    a bug of ours
 2    wrong usage or configuration
 3    some queries failed and the rest are done
 4    input that cannot be used
 5    the surroundings failed: storage, cluster, disk full, memory
130   stopped by Ctrl-C, 143 by SIGTERM; the same command continues
====  ==========================================================================
"""

import errno
import signal
from types import FrameType

from scarcade.engine.errors import ScarcadeError
from scarcade.engine.memory import ran_out

STOPPED = "stopped; the same command continues where it stood"
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of the disk is used up"}
_WRONG_INPUT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: whatever ends tidily at Ctrl-C ends tidily at a node that is taken away."""


def stop_tidily_on_sigterm() -> None:
    """Turn SIGTERM into `Terminated` in the main thread."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)


def explained(error: BaseException) -> tuple[int, str]:  # noqa: PLR0911  (a table, read from top to bottom)
    """(exit code, message) for an exception that ended a command."""
    if isinstance(error, ScarcadeError):
        return error.exit_code, str(error)
    if isinstance(error, Terminated):
        return 143, STOPPED
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error) or STOPPED
    if ran_out(error):
        return 5, "out of memory: lower --batch-size or the number of --workers, or use a machine with more"
    if isinstance(error, OSError) and error.errno is not None:
        return _explained_os_error(error)
    kind = type(error)
    if kind.__module__.partition(".")[0] == "ray":
        return 5, f"Ray failed ({kind.__name__}): {_first_line(error)}"
    return 1, (
        f"{kind.__module__}.{kind.__qualname__}: {_first_line(error)}\n"
        "This is a bug of ours. Please report it with what the same command prints with --debug, and with "
        "`scarcade --version` (CONTRIBUTING.md says where)."
    )


def _explained_os_error(error: OSError) -> tuple[int, str]:
    where = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in _FULL:
        return 5, f"{where}{_FULL[error.errno]}; free some space and run the same command again"
    if error.errno in _WRONG_INPUT:
        return 4, f"{where}{error.strerror}"
    return 5, f"{where}{error.strerror or error}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
