"""Label transfer against scikit-learn's classifier and against numbers of the original implementation."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from scarcade.engine.errors import CategoryError, NonFiniteError
from scarcade.engine.schema import Categories
from scarcade.jobs.label_transfer import LabelTransfer, codes_of, neighbour_weights, votes

AB = Categories("cell_type", ("a", "b"))


def clouds(n: int = 900) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(4, size=n)
    latent = rng.normal(size=(n, 10))
    latent[:, 0] += 2.5 * codes
    return latent.astype(np.float32), codes


def test_gaussian_weights_are_the_numbers_of_the_original() -> None:
    """`weighted_knn_transfer` of scArches 0.6.1, k = 4, run on these points."""
    reference = np.array([[0, 0], [1, 0], [0, 1], [5, 5], [6, 5], [5, 6]], np.float32)
    transfer = LabelTransfer(reference, [(AB, np.array([0, 0, 0, 1, 1, 1]))], k=4)
    (prediction,) = transfer.predict(np.array([[0.2, 0.2], [3, 2.5]], np.float32))
    np.testing.assert_array_equal(prediction.codes, [0, 0])
    np.testing.assert_allclose(prediction.uncertainty, [5.25e-6, 0.251118 + 0.0], rtol=2e-2, atol=1e-6)
    weights = neighbour_weights(np.array([[3.201562, 3.201562, 3.354102, 3.905125]]), "gaussian")
    np.testing.assert_allclose(weights[0], [0.251118, 0.251118, 0.250317, 0.247446], atol=2e-6)


def test_equal_distances_give_equal_weights_where_the_original_divides_by_zero() -> None:
    np.testing.assert_allclose(neighbour_weights(np.full((1, 4), 2.0), "gaussian"), 0.25)


@pytest.mark.parametrize("k", [15, 50])
def test_distance_weights_are_those_of_scikit_learn(k: int) -> None:
    latent, codes = clouds()
    names = Categories("cell_type", tuple("abcd"))
    transfer = LabelTransfer(latent[:600], [(names, codes[:600])], k=k, weights="distance", block=64)
    (prediction,) = transfer.predict(latent[550:])  # 50 of them are reference cells: at distance 0
    classifier = KNeighborsClassifier(k, weights="distance").fit(latent[:600].astype(float), codes[:600])
    probabilities = classifier.predict_proba(latent[550:].astype(float))
    np.testing.assert_array_equal(prediction.codes, probabilities.argmax(axis=1))
    np.testing.assert_allclose(prediction.uncertainty, 1 - probabilities.max(axis=1), atol=1e-6)


def test_unlabelled_cells_never_vote_and_never_take_a_place() -> None:
    latent, codes = clouds()
    hidden = np.where(np.arange(900) % 3 == 0, codes, -1)
    names = Categories("cell_type", tuple("abcd"))
    with_hidden = LabelTransfer(latent, [(names, hidden)]).predict(latent[:50])[0]
    alone = LabelTransfer(latent[::3], [(names, codes[::3])]).predict(latent[:50])[0]
    np.testing.assert_array_equal(with_hidden.codes, alone.codes)
    np.testing.assert_array_equal(with_hidden.uncertainty, alone.uncertainty)


def test_each_column_is_transferred_and_one_without_labels_is_named() -> None:
    latent, codes = clouds()
    coarse, none = Categories("coarse", ("x", "y")), Categories("empty", ("z",))
    transfer = LabelTransfer(
        latent, [(Categories("fine", tuple("abcd")), codes), (coarse, codes // 2), (none, np.full(900, -1))]
    )
    fine, two = transfer.predict(latent)
    assert (fine.column.name, two.column.name) == ("fine", "coarse")
    assert transfer.skipped == ("empty",)
    assert np.mean(two.codes == codes // 2) > np.mean(fine.codes == codes) > 0.7


def test_equal_votes_go_to_the_first_class() -> None:
    latent = np.array([[-1, 0], [1, 0]], np.float32)
    transfer = LabelTransfer(latent, [(AB, np.array([1, 0]))], k=2)
    (prediction,) = transfer.predict(np.zeros((1, 2), np.float32))
    assert (prediction.codes[0], prediction.uncertainty[0]) == (0, 0.5)


def test_distance_is_one_at_the_edge_of_the_reference_and_grows_outside() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(3000, 10)).astype(np.float32)
    transfer = LabelTransfer(reference, [])
    like_it = transfer.distance(rng.normal(size=(1000, 10)).astype(np.float32))
    assert np.mean(like_it > 1) == pytest.approx(0.05, abs=0.03)
    assert transfer.distance(rng.normal(size=(100, 10)).astype(np.float32) + 5).min() > 1.5


def test_tiny_references_work() -> None:
    transfer = LabelTransfer(np.zeros((1, 3), np.float32), [(AB, np.array([1]))])
    (prediction,) = transfer.predict(np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(prediction.codes, [1, 1])
    assert np.isfinite(transfer.distance(np.ones((2, 3), np.float32))).all()


def test_no_query_cells_give_no_predictions() -> None:
    latent, codes = clouds()
    (prediction,) = LabelTransfer(latent, [(Categories("c", tuple("abcd")), codes)]).predict(latent[:0])
    assert len(prediction.codes) == len(prediction.uncertainty) == 0


@pytest.mark.parametrize("where", ["reference", "query"])
def test_a_latent_that_is_not_finite_is_an_error(where: str) -> None:
    latent, codes = clouds(50)
    broken = latent.copy()
    broken[3, 3] = np.nan
    with pytest.raises(NonFiniteError, match=where):
        LabelTransfer(broken if where == "reference" else latent, [(AB, codes % 2)]).predict(broken)


def test_labels_of_another_length_are_an_error() -> None:
    with pytest.raises(CategoryError, match="cell_type"):
        LabelTransfer(np.zeros((3, 2), np.float32), [(AB, np.zeros(2, int))])


def test_votes_add_up() -> None:
    shares = votes(np.array([[0, 2, 2]]), np.array([[0.2, 0.3, 0.5]]), 4)
    np.testing.assert_allclose(shares, [[0.2, 0.0, 0.8, 0.0]])


def test_codes_follow_the_references_order() -> None:
    np.testing.assert_array_equal(codes_of(["b", None, "a", "not there"], AB), [1, -1, 0, -1])


def test_blocks_and_one_search_for_both_change_nothing() -> None:
    rng = np.random.default_rng(3)
    latent, query = (rng.normal(size=(n, 4)).astype(np.float32) for n in (500, 130))
    codes = rng.integers(-1, 2, 500)
    columns = [(AB, codes), (Categories("c", ("x", "y")), rng.integers(0, 2, 500))]
    whole, by_blocks = (LabelTransfer(latent, columns, k=12, block=block) for block in (16_384, 17))
    predictions, distance = by_blocks.of(query)
    np.testing.assert_array_equal(distance, whole.distance(query))
    for one, other in zip(predictions, whole.predict(query), strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.uncertainty, other.uncertainty)
