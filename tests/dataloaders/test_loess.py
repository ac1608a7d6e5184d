import numpy as np
import pytest

from scarcade.dataloaders.loess import fitted


@pytest.mark.parametrize("n", [50, 501, 3000])
def test_the_curve_is_that_of_the_original_library(n: int) -> None:
    library = pytest.importorskip("skmisc.loess")
    rng = np.random.default_rng(n)
    x = np.log10(rng.gamma(0.3, 1.0, n) + 1e-4)
    y = x + 0.3 * x**2 + rng.normal(0, 0.2, n)
    model = library.loess(x, y, span=0.3, degree=2)
    model.fit()
    assert np.abs(fitted(x, y, span=0.3) - model.outputs.fitted_values).max() < 1e-8


def test_a_parabola_is_its_own_smooth() -> None:
    x = np.linspace(-1, 2, 200)
    assert fitted(x, 1 + x - 3 * x**2, span=0.3) == pytest.approx(1 + x - 3 * x**2, abs=1e-8)


def test_few_and_tied_points_are_smoothed_to_finite_values() -> None:
    for x in (np.arange(4.0), np.zeros(30), np.repeat([0.0, 1.0, 2.0], 20)):
        assert np.isfinite(fitted(x, np.cos(x), span=0.3)).all()
