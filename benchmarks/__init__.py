"""Speed and quality, measured beside the peers: each module's first lines say how it is run."""

import os


def as_installed() -> dict[str, str]:
    """The environment of a process that is to start as a user's does: with modules that were compiled before."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
