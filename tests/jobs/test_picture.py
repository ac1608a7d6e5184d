"""A query's cells as small integers."""

import base64

import numpy as np

from scarcade.engine.schema import Categories
from scarcade.jobs.label_transfer import Prediction
from scarcade.jobs.picture import SHOWN, STEPS, in_frame, label_codes, picture, shown_rows
from scarcade.jobs.projection import project


def test_places_are_kept_to_a_thirty_thousandth_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(300, 4)).astype(np.float32)
    projection = project(latent, "pca")
    whole = in_frame(projection.points, projection)
    assert whole.min() == round(STEPS / 4)
    assert whole.max() == round(3 * STEPS / 4)
    low, high = projection.points.min(axis=0), projection.points.max(axis=0)
    back = low + (whole / STEPS * 2 - 0.5) * (high - low)
    assert np.abs(back - projection.points).max() < (high - low).max() / 30_000


def test_a_picture_holds_the_same_cells_in_all_its_parts() -> None:
    rng = np.random.default_rng(0)
    projection = project(rng.normal(size=(300, 4)).astype(np.float32), "pca")
    mean = rng.normal(size=(SHOWN + 500, 4)).astype(np.float32)
    mean[0] = 1000
    codes = rng.integers(0, 7, len(mean))
    distance = np.linspace(0, 6, len(mean)).astype(np.float32)
    prediction = Prediction(Categories("type", tuple("abcdefg")), codes, np.full(len(mean), 0.5, np.float32))
    found = picture(mean, [prediction], distance, projection, seed=3)["picture"]
    rows = shown_rows(len(mean), 3)
    assert found["n"] == SHOWN == len(rows)
    assert found["outside"] == int(0 in rows)
    np.testing.assert_array_equal(_bytes(found["labels"]["type"]), codes[rows])
    assert set(_bytes(found["uncertainty"]["type"])) == {128}
    np.testing.assert_allclose(_bytes(found["distance"]) / 85, np.clip(distance[rows], 0, 3), atol=0.01)
    assert picture(mean[:0], [], None, projection, 0) == {}
    assert picture(mean, [], None, None, 0) == {}


def test_many_labels_take_two_bytes() -> None:
    assert list(_bytes(label_codes(np.array([0, 254, -1]), 255))) == [0, 254, 255]
    assert list(_bytes(label_codes(np.array([0, 300, -1]), 301))) == [0, 0, 44, 1, 255, 255]


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)
