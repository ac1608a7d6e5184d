"""Where the data lie that are shared beside the project and never copied into it."""

import os
from pathlib import Path

import pytest

_SHARED = Path(os.environ.get("SCARCADE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """``shared(path)``, or a skip that says what is missing."""
    found = _SHARED / path
    if not found.exists():
        pytest.skip(f"needs {path} of the shared data, which is not on this machine")
    return found
