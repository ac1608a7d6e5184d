"""Begins the Ray session of a training before the command line is understood, where it is plain that one is needed.

If it turns out otherwise, because an option is wrong, it goes with the process, after the error was told.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from scarcade.engine import ahead
from scarcade.engine.cores import granted, offered

_ELSEWHERE = ("--scale", "--config", "--debug")  # which may name a cluster, or want other sizes


def head_start(argv: Sequence[str]) -> None:
    """Begin a private session if ``train --workers N`` will plainly want one."""
    cpus = wanted(argv)
    if cpus is not None:
        ahead.begin(cpus)


def wanted(argv: Sequence[str]) -> int | None:
    """The cores of the private session that a command line will ask for; None: of none, or it is not plain."""
    if argv[0] != "train" or os.environ.get("RAY_ADDRESS") or any(one.startswith(_ELSEWHERE) for one in argv):
        return None
    workers, threads = _number(argv, "workers"), _number(argv, "threads")
    if not workers or _is_done(argv):
        return None
    return offered(workers, granted(workers, threads or None, None, private=True)[0])


def _number(argv: Sequence[str], option: str) -> int:
    """The value of ``--option``; 0 if there is none, or it is not a number."""
    text = value(argv, option) or ""
    return int(text) if text.isdecimal() and len(text) < 6 else 0


def _is_done(argv: Sequence[str]) -> bool:
    """Whether the run has its model already."""
    out = value(argv, "out")
    return out is None or Path(out, "model", "model.json").exists()


def value(argv: Sequence[str], option: str) -> str | None:
    """The value of ``--option``, wherever it stands."""
    for i, token in enumerate(argv):
        if token.startswith(f"--{option}="):
            return token.partition("=")[2]
        if token == f"--{option}" and i + 1 < len(argv):
            return argv[i + 1]
    return None
