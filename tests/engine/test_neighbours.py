"""The blocked neighbour search against distances written out."""

import numpy as np
import pytest

from scarcade.engine.errors import NonFiniteError, UsageError
from scarcade.engine.nearest_kernel import GROUP, STRIP
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


@pytest.mark.parametrize("n", [1, STRIP - 1, STRIP, 3 * STRIP + 1, 70 * STRIP])
@pytest.mark.parametrize("width", [1, 2, 7])
def test_every_number_of_cells_and_dimensions(n: int, width: int) -> None:
    rng = np.random.default_rng(n + width)
    reference, query = rng.normal(size=(n, width)).astype(np.float32), rng.normal(size=(GROUP + 3, width))
    distances, found = Neighbours(reference).of(query, 9)
    wanted, places = written_out(reference, query.astype(np.float32), 9)
    np.testing.assert_array_equal(found, places)
    np.testing.assert_allclose(distances, wanted, rtol=1e-12)


@pytest.mark.parametrize("order", [1, -1])
def test_cells_in_the_order_of_their_distance_and_twins_by_their_places(order: int) -> None:
    grid = np.repeat(np.arange(700.0), 3)[::order]  # every cell three times, farther and farther or nearer and nearer
    reference = np.column_stack([grid, np.zeros_like(grid)]).astype(np.float32)
    distances, found = Neighbours(reference).of(np.zeros((1, 2)), 20)
    wanted, places = written_out(reference, np.zeros((1, 2), np.float32), 20)
    np.testing.assert_array_equal(found, places)
    np.testing.assert_array_equal(distances, wanted)


def test_float32_does_not_decide_between_cells_that_it_cannot_tell_apart() -> None:
    rng = np.random.default_rng(5)  # squares of about 1e6 that differ by less than float32 holds
    reference = (1e3 + rng.normal(size=(4 * STRIP, 6)) * 1e-3).astype(np.float32)
    distances, found = Neighbours(reference).of(np.zeros((3, 6)), 50)
    wanted, places = written_out(reference, np.zeros((3, 6), np.float32), 50)
    np.testing.assert_array_equal(found, places)
    np.testing.assert_allclose(distances, wanted, rtol=1e-15)


@pytest.mark.parametrize("where", ["reference", "query"])
def test_what_is_not_finite_is_refused(where: str) -> None:
    good, bad = np.zeros((2, 3), np.float32), np.full((2, 3), np.nan, np.float32)
    with pytest.raises(NonFiniteError, match="not finite"):
        Neighbours(bad if where == "reference" else good).of(bad, 1)
