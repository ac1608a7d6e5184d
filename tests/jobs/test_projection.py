"""The frame of the report."""

import numpy as np
import pytest
from ray import cloudpickle

from scarcade.jobs.projection import SAMPLE, project


def test_principal_components_keep_the_largest_spread_and_do_not_depend_on_signs() -> None:
    rng = np.random.default_rng(0)
    latent = (rng.normal(size=(500, 5)) * [1, 5, 0.1, 3, 0.1]).astype(np.float32)
    found = project(latent, "pca")
    points = found.of(latent)
    assert abs(np.corrcoef(points[:, 0], latent[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(points[:, 1], latent[:, 3])[0, 1]) > 0.98
    np.testing.assert_allclose(project(latent[::-1].copy(), "pca").of(latent), points, atol=1e-3)
    assert found.axes == ("PC 1", "PC 2")


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (3, 2)])
def test_small_latents_have_a_picture_too(shape: tuple[int, int]) -> None:
    latent = np.ones(shape, np.float32)
    assert project(latent, "pca").of(latent).shape == (shape[0], 2)


def test_a_large_reference_is_shown_by_a_sample() -> None:
    latent = np.random.default_rng(0).normal(size=(SAMPLE + 100, 3)).astype(np.float32)
    found = project(latent, "pca")
    assert found.points.shape == (SAMPLE, 2)
    np.testing.assert_array_equal(found.points, found.of(latent[found.sample]))


@pytest.mark.slow
def test_umap_puts_queries_where_their_like_are() -> None:
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    latent = np.concatenate([rng.normal(size=(200, 4)), rng.normal(size=(200, 4)) + 12]).astype(np.float32)
    found = project(latent, "umap")
    near = found.of((rng.normal(size=(20, 4)) + 12).astype(np.float32)).mean(axis=0)
    one, other = found.points[:200].mean(axis=0), found.points[200:].mean(axis=0)
    assert np.linalg.norm(near - other) < np.linalg.norm(near - one)
    carried = cloudpickle.loads(cloudpickle.dumps(found))  # type: ignore[no-untyped-call]  # as Ray takes it along
    np.testing.assert_array_equal(carried.of(latent[:5]), found.of(latent[:5]))
