"""What a process that crashes still says: the signal, in a file that whoever waits for it can read.

Ray tells that a worker is gone, not why. Of signals that Python can catch (a segmentation fault, an abort) its
faulthandler writes the name; SIGKILL cannot be caught, so a file that stayed empty tells of it.
"""

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scarcade.jobs.results import RECORDS

PREFIX = ".last-words-"
_SIGNALS = {
    "Segmentation fault": "SIGSEGV (segmentation fault)",
    "Aborted": "SIGABRT (abort, as of compiled code that could not allocate memory)",
    "Bus error": "SIGBUS (bus error)",
    "Illegal instruction": "SIGILL (illegal instruction)",
    "Floating-point exception": "SIGFPE (arithmetic error)",
    "Floating point exception": "SIGFPE (arithmetic error)",
}


def _path(out: Path, ident: str) -> Path:
    return out / RECORDS / f"{PREFIX}{ident}"


@contextmanager
def speaking(out: Path, ident: str) -> Iterator[None]:
    """Within the block a crash of this process is written down for `last_words`."""
    path = _path(out, ident)
    with open(path, "w") as file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.enable(sys.__stderr__ or sys.stderr, all_threads=False)  # as Ray has it
    path.unlink(missing_ok=True)


def last_words(out: Path, ident: str) -> str:
    """How the process with this `ident` ended; its file is removed."""
    path = _path(out, ident)
    try:
        text = path.read_text(errors="replace")[:10_000]
    except OSError:
        return "its process ended"
    path.unlink(missing_ok=True)
    known = next((told for said, told in _SIGNALS.items() if f"Fatal Python error: {said}" in text), None)
    if known is not None:
        return f"its process died of {known}"
    return "its process was killed from outside (SIGKILL: by hand, or by the kernel when memory runs out)"
