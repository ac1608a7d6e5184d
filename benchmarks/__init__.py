"""Speed and quality, measured beside the peers: each module's first lines say how it is run."""

import os

_GIVEN = dict(os.environ)

import scarcade  # noqa: E402, F401 - before torch: it sets how OpenMP's threads wait, which torch reads once


def environment(**more: object) -> dict[str, str]:
    """The environment of a contender: as it was given to us, so that the peers' threads wait as they do by default."""
    return {**_GIVEN, **{name: str(value) for name, value in more.items()}}


def as_installed() -> dict[str, str]:
    """The environment of a process that is to start as a user's does: with modules that were compiled before."""
    return {name: value for name, value in _GIVEN.items() if name != "PYTHONDONTWRITEBYTECODE"}
