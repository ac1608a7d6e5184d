"""Waits for a driver to end, however it ends, and then removes what its private Ray session left.

Run as a program of its own, with nothing but the standard library: ``python watchdog.py FOLDER``. The driver
holds the other end of its standard input, so that the end of the file is the end of the driver, kill -9
included. Most of Ray's processes follow their driver by themselves; its agents linger for a minute, and its
folder for ever.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path


def holders(folder: Path, but: int) -> list[int]:
    """Processes of this user, `but` one, that have a file below `folder` open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        try:
            if pid in (os.getpid(), but) or process.stat().st_uid != os.getuid():
                continue
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue  # it ended meanwhile, or is not ours to look at
        if any(Path(link).is_relative_to(folder) for link in links):
            found.append(pid)
    return found


def clean(folder: Path, driver: int, *, patience_s: float = 5.0) -> None:
    """End the processes that hold files in `folder`, but not a `driver` that goes on, then remove it."""
    deadline = time.monotonic() + patience_s
    while (pids := holders(folder, driver)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parent = os.getppid()
    sys.stdin.buffer.read()
    clean(Path(sys.argv[1]), parent)
