"""Where a submitted job begins, on a node of the cluster: first whether the environment will do, then the command.

A Python that is too old, or a cluster without torch, is one clear error here instead of a traceback from somewhere.
Nothing else of the package is imported before that is known.
"""

from __future__ import annotations  # so that a Python that is too old can read this file

import importlib.metadata
import os
import sys

_NEWER = (3, 11)


def problems() -> list[str]:
    """What this environment lacks of what the shipped package says that it needs, a phrase each."""
    from packaging.requirements import Requirement

    found = []
    for text in importlib.metadata.requires("scarcade") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{wanted.name}{wanted.specifier} is not installed")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted.name}{wanted.specifier} is wanted, and {version} is installed")
    return found


def main(argv: list[str]) -> int:
    """Exit code of the command, or 5 if it cannot run here."""
    if sys.version_info < _NEWER:
        return _cannot(f"Python {'.'.join(map(str, _NEWER))} or newer is wanted, and this is {sys.version.split()[0]}")
    lacking = problems()
    if lacking:
        return _cannot("; ".join(lacking))
    from scarcade.jobs.cli import main as run

    return run(argv)


def _cannot(reason: str) -> int:
    where = f"{sys.executable} on {os.uname().nodename}"
    print(f"error: the cluster's environment ({where}) cannot run scarcade: {reason}", file=sys.stderr, flush=True)
    return 5


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
