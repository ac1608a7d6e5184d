"""What a worker of a mapping is given."""

import pytest

from scarcade.engine.config import checked
from scarcade.engine.errors import UsageError
from scarcade.jobs.map_scale import MapScale


def test_memory_is_a_size_and_not_less_than_a_worker_takes_by_itself() -> None:
    assert checked(MapScale, {"memory_per_worker": "2GB"}).memory == 2 * 10**9
    assert MapScale().memory is None
    with pytest.raises(UsageError, match=r"memory-per-worker: .*wanted a size like 4GB.*'lots'"):
        checked(MapScale, {"memory_per_worker": "lots"})
    with pytest.raises(UsageError, match="a worker takes 500 MB before its first query"):
        checked(MapScale, {"memory_per_worker": "100MB"})
