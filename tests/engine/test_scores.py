"""Scores against scikit-learn, against formulas written out, and on latents whose scores are known."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from scarcade.engine.errors import InputError
from scarcade.engine.scores import (
    graph_connectivity,
    integration,
    inverse_simpson,
    label_accuracy,
    rejected_mixing,
)


def clouds(separation: float, batch_shift: float, n: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three labels `separation` apart, two batches `batch_shift` apart."""
    rng = np.random.default_rng(0)
    labels, batches = rng.integers(3, size=n), rng.integers(2, size=n)
    latent = rng.normal(size=(n, 5))
    latent[:, 0] += separation * labels
    latent[:, 1] += batch_shift * batches
    return latent.astype(np.float32), labels, batches


def test_accuracy_and_f1_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(-1, 5, 300), rng.integers(0, 7, 300)
    scores = label_accuracy(truth, predicted)
    known = truth >= 0
    assert scores["accuracy"] == pytest.approx(np.mean(truth[known] == predicted[known]))
    assert scores["macro_f1"] == pytest.approx(f1_score(truth[known], predicted[known], average="macro"))


def test_a_cell_without_a_prediction_is_a_miss() -> None:
    assert label_accuracy(np.array([0, 0, 1]), np.array([0, -1, 1]))["accuracy"] == pytest.approx(2 / 3)


def test_accuracy_without_known_labels_is_an_error() -> None:
    with pytest.raises(InputError, match="no cell has a known label"):
        label_accuracy(np.array([-1, -1]), np.array([0, 1]))


def test_inverse_simpson_of_even_and_of_pure_neighbourhoods() -> None:
    distances = np.ones((2, 90))
    codes = np.stack([np.arange(90) % 3, np.zeros(90, int)])
    np.testing.assert_allclose(inverse_simpson(distances, codes), [3.0, 1.0])


def test_inverse_simpson_weighs_near_cells_more() -> None:
    near_first = np.concatenate([np.linspace(0.1, 1, 45), np.linspace(5, 9, 45)])[None]
    codes = (np.arange(90) >= 45).astype(int)[None]
    assert inverse_simpson(near_first, codes)[0] < 1.2


def test_mixing_is_rejected_only_where_batches_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.integers(2, size=(2000, 50))
    assert rejected_mixing(mixed, np.array([0.5, 0.5])) == pytest.approx(0.065, abs=0.03)  # about alpha
    assert rejected_mixing(np.zeros((10, 50), int), np.array([0.5, 0.5])) == 1.0


def test_connectivity_counts_the_largest_part() -> None:
    # label 0: cells 0-3 in two pairs, label 1: cells 4-6 in a ring
    places = np.array([[1], [0], [3], [2], [5], [6], [4]])
    assert graph_connectivity(places, np.array([0, 0, 0, 0, 1, 1, 1])) == pytest.approx((0.5 + 1.0) / 2)


def test_apart_labels_and_mixed_batches_score_near_one() -> None:
    scores = integration(*clouds(separation=12.0, batch_shift=0.0))
    assert scores["clisi"] > 0.99
    assert scores["nmi"] > 0.99
    assert scores["ari"] > 0.99
    assert scores["graph_connectivity"] == 1.0
    assert scores["ilisi"] > 0.85
    assert scores["kbet"] > 0.85
    assert scores["silhouette_batch"] > 0.9
    assert scores["total"] == pytest.approx(0.6 * scores["label_score"] + 0.4 * scores["batch_score"])


def test_batches_apart_are_seen_and_labels_mixed_too() -> None:
    apart = integration(*clouds(separation=12.0, batch_shift=12.0))
    assert apart["ilisi"] < 0.05
    assert apart["kbet"] < 0.05
    assert apart["silhouette_batch"] < 0.5
    mixed = integration(*clouds(separation=0.0, batch_shift=0.0))
    assert mixed["nmi"] < 0.05
    assert mixed["clisi"] < 0.3


def test_a_score_is_of_a_sample_and_does_not_depend_on_other_randomness() -> None:
    data = clouds(separation=3.0, batch_shift=1.0, n=1500)
    np.random.default_rng().normal()
    first = integration(*data, max_cells=400, seed=3)
    assert first == integration(*data, max_cells=400, seed=3)
    assert first["n_cells"] == 400


def test_unlabelled_cells_are_not_scored() -> None:
    latent, labels, batches = clouds(separation=12.0, batch_shift=0.0)
    labels[:100] = -1
    latent[:100] = 1e6
    scores = integration(latent, labels, batches)
    assert scores["n_cells"] == 500
    assert scores["nmi"] > 0.99


def test_only_batches_or_only_labels() -> None:
    latent, labels, batches = clouds(separation=12.0, batch_shift=0.0)
    assert "label_score" not in integration(latent, None, batches)
    assert "ilisi" not in integration(latent, labels, None)


@pytest.mark.parametrize("wrong", ["few", "nan"])
def test_what_cannot_be_scored_is_an_error(wrong: str) -> None:
    latent, labels, batches = clouds(separation=1.0, batch_shift=0.0, n=50)
    if wrong == "few":
        labels[5:] = -1
    else:
        latent[3, 2] = np.nan
    with pytest.raises(InputError):
        integration(latent, labels, batches)
