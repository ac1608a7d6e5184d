"""The blocked neighbour search against distances written out."""

import numpy as np
import pytest

from scarcade.engine.errors import UsageError
from scarcade.engine.neighbours import Neighbours


def written_out(reference: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.sqrt(((query[:, None].astype(float) - reference[None].astype(float)) ** 2).sum(-1))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def test_neighbours_are_the_nearest_whatever_the_block() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(700, 10)).astype(np.float32)
    query = rng.normal(size=(123, 10)).astype(np.float32)
    wanted, places = written_out(reference, query, 15)
    for block in (7, 16_384):
        distances, found = Neighbours(reference).of(query, 15, block=block)
        np.testing.assert_array_equal(found, places)
        np.testing.assert_allclose(distances, wanted, rtol=1e-12)


def test_distances_of_near_cells_far_from_the_origin_are_exact() -> None:
    reference = np.full((3, 4), 1000.0, np.float32)
    reference[1, 0] += 0.001
    reference[2, 0] += 0.002
    distances, found = Neighbours(reference).of(reference[:1], 3)
    np.testing.assert_array_equal(found, [[0, 1, 2]])
    np.testing.assert_allclose(distances[0], reference[:, 0].astype(float) - 1000.0, atol=1e-12)


def test_a_cell_is_not_its_own_neighbour_even_among_twins() -> None:
    latent = np.zeros((6, 3), np.float32)  # six twins: all at distance 0
    _, places = Neighbours(latent).of_each_other(3)
    assert places.shape == (6, 3)
    assert not (places == np.arange(6)[:, None]).any()


def test_k_is_cut_to_the_cells_there_are() -> None:
    latent = np.eye(3, dtype=np.float32)
    assert Neighbours(latent).of(latent, 50)[0].shape == (3, 3)
    assert Neighbours(latent).of_each_other(50)[0].shape == (3, 2)


def test_no_cells_are_refused() -> None:
    with pytest.raises(UsageError, match="neighbours"):
        Neighbours(np.zeros((0, 10), np.float32))
