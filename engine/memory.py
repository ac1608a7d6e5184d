"""Memory of a process: sizes as people write them, a hard limit, and telling that an error means there was none left.

The limit is the kernel's RLIMIT_DATA, on private memory that can be written. Tried with Ray and torch: numpy, torch
and Python then raise, the worker lives on, and the next allocation that fits succeeds. RLIMIT_AS counts what is
mapped, and a Ray worker maps gigabytes that it never touches; a thread that looks at the resident size now and then
comes too late.
"""

import re
from pathlib import Path

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "k": 10**3, "m": 10**6, "g": 10**9}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_STATUS = Path("/proc/self/status")


def bytes_of(text: str) -> int:
    """Bytes of a size like ``4GB``, ``1.5 GiB``, ``800 MB``; a bare number is bytes.

    Raises:
        ValueError: it is not a size.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].lower() if match else None
    if match is None or unit not in _UNITS:
        raise ValueError(f"wanted a size like 4GB, 1.5GiB or 800MB; given: {text!r}")
    return int(float(match[1]) * _UNITS[unit])


def size_text(n_bytes: float) -> str:
    """A number of bytes for people: ``1.5 GB``, ``800 MB``."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{max(1.0, n_bytes / 1e6):.0f} MB"


def hold_to(limit: int | None) -> None:
    """From now on this process fails to allocate what would take its own memory beyond `limit` bytes; None: no limit.

    For worker processes alone, never for that of a user. What is mapped but was never touched (the stacks of threads)
    does not count. Where the kernel keeps no such account, nothing is limited.
    """
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = _held()
    if limit is None or held is None:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        return
    mapped, touched = held
    wanted = mapped + max(0, limit - touched)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _held() -> tuple[int, int] | None:
    """Bytes of private memory that are mapped for writing, and those of them that were touched; None: not told here."""
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        mapped, touched = (int(lines[name].split()[0]) << 10 for name in ("VmData", "RssAnon"))
    except (OSError, KeyError, ValueError):
        return None
    return mapped, touched


def ran_out(error: BaseException) -> bool:
    """Whether an error means that no memory could be had: Python's, numpy's, torch's on a CPU or GPU, Ray's.

    So does one of ours that was raised from such a one, as when a file is too large to be read.
    """
    if error.__cause__ is not None and ran_out(error.__cause__):
        return True
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "bad_alloc" in text)
