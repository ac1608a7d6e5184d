"""A session that begins ahead of time is taken if it is the one that is wanted, and gone if not."""

import importlib
from typing import Any

import pytest

from scarcade.engine import ahead
from scarcade.engine.cluster import cluster, is_private


def cpus() -> Any:
    """How many of them Ray has; None without a session."""
    ray: Any = importlib.import_module("ray")
    return ray.cluster_resources()["CPU"] if ray.is_initialized() else None


def test_it_is_taken_and_lasts_until_its_end() -> None:
    ahead.begin(3)
    with cluster(cpus=3):
        assert is_private()
        assert cpus() == 3
    assert cpus() == 3
    ahead.end()
    assert cpus() is None
    assert not is_private()


@pytest.mark.long
def test_another_one_is_started_where_another_is_wanted() -> None:
    ahead.begin(3)
    with cluster(cpus=2):
        assert cpus() == 2
    assert cpus() is None
