"""Looks through an .h5ad in a process of its own first: on damaged files the HDF5 library itself hangs or crashes.

No check of ours can stand in front of a library that loops over a heap of size zero. So one child a process reads
every attribute, every name and every text of a file and the first and last values of each array; a file that it
does not survive is refused, and the child is started anew. It costs a third of a second once, and milliseconds a file.
Run as a program this file is that child; it needs h5py and the standard library.
"""

import atexit
import json
import math
import os
import select
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

_PATIENCE_S = 10.0  # for a small file; a large one has a second more for every 5 MB
_BYTES_PER_S = 5e6
_START_S = 120.0
_LARGEST_CHUNK = 1 << 28  # bytes
_WHOLE = 1 << 20  # values of an array that are all read; of a longer one its ends:
_ENDS = 1 << 16
_child: "tuple[int, subprocess.Popen[bytes]] | None" = None
_lock = threading.Lock()


def probe(path: Path) -> str | None:
    """What HDF5 does on the file ("hangs", "crashes"), or None if it can be read in this process."""
    global _child  # noqa: PLW0603  one child a process is the point
    with _lock:
        if _child is None or _child[0] != os.getpid() or _child[1].poll() is not None:
            _child = os.getpid(), _started()
        process = _child[1]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(str(path)).encode() + b"\n")
        process.stdin.flush()
        patience = _PATIENCE_S + path.stat().st_size / _BYTES_PER_S
        if not select.select([process.stdout], [], [], patience)[0]:
            _end(process)
            return f"hangs (for {patience:.0f} seconds)"
        if not process.stdout.read(1):
            _end(process)
            return "crashes"
    return None


def _started() -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-I", str(Path(__file__).resolve())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], _START_S)[0] or process.stdout.read(1) != b"r":
        _end(process)
        raise RuntimeError(f"the process that looks through .h5ad files did not start: {' '.join(command)}")
    return process


@atexit.register
def _end_with_us() -> None:
    """The child ends with its parent by itself (its input ends); this also waits for it and closes the pipes."""
    if _child is not None and _child[0] == os.getpid():
        _end(_child[1])


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _look(path: str) -> None:
    """Touch all that the reader will touch; what raises will raise again where it can be told."""
    import h5py

    def attributes(value: Any) -> None:
        for name in value.attrs:
            value.attrs[name]

    def member(_: str, value: Any) -> None:
        with suppress(Exception):  # an error is not a crash
            attributes(value)
            if not isinstance(value, h5py.Dataset) or value.shape is None or value.external or value.is_virtual:
                return
            if value.chunks is not None:
                if math.prod(value.chunks) * value.dtype.itemsize > _LARGEST_CHUNK:
                    return  # refused by its size alone (`limits`), or read nowhere else
                if value.id.get_storage_size() > 0:
                    value.id.get_num_chunks()
            if not value.shape or not value.shape[0]:
                value[()]
                return
            width = max(1, value.size // value.shape[0])
            part = max(1, (_WHOLE if value.size <= _WHOLE else _ENDS) // width)
            if width <= _WHOLE:
                value[:part]
                if value.shape[0] > part:
                    value[max(part, value.shape[0] - part) :]

    with h5py.File(path, "r") as file:
        attributes(file)
        file.visititems(member)


if __name__ == "__main__":
    import h5py  # noqa: F401  before it says that it is ready

    sys.stdout.write("r")
    sys.stdout.flush()
    for line in sys.stdin:
        with suppress(Exception):  # an error is not a crash
            _look(json.loads(line))
        sys.stdout.write("d")
        sys.stdout.flush()
