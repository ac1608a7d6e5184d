"""A session that begins ahead of time is taken if it is the one that is wanted, and gone if not."""

from scarcade.engine import ahead
from scarcade.engine.cluster import cluster, is_private


def test_it_is_taken_and_lasts_until_its_end() -> None:
    import ray

    ahead.begin(3)
    with cluster(cpus=3):
        assert is_private()
        assert ray.cluster_resources()["CPU"] == 3
    assert ray.is_initialized()
    ahead.end()
    assert not ray.is_initialized()
    assert not is_private()


def test_another_one_is_started_where_another_is_wanted() -> None:
    import ray

    ahead.begin(3)
    with cluster(cpus=2):
        assert ray.cluster_resources()["CPU"] == 2
    assert not ray.is_initialized()
