import warnings

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from scarcade.models.protein_background import FLAT, BackgroundPrior, lower_component


def test_the_lower_component_is_that_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    high = rng.permuted(np.tile(np.arange(20) < 8, (40, 1)), axis=1)  # far apart, so that there is one optimum
    x = np.log1p(rng.poisson(np.where(high, 400.0, 6.0) * rng.gamma(5.0, 0.2, (40, 20))))
    mean, variance = lower_component(torch.as_tensor(x), torch.ones(x.shape, dtype=torch.bool))
    close = 0
    for row, m, v in zip(x, mean, variance, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = GaussianMixture(2, random_state=0, n_init=3).fit(row[:, None])
        low = int(fitted.means_.argmin())
        close += abs(fitted.means_[low, 0] - float(m)) < 0.02 and abs(fitted.covariances_[low, 0, 0] - float(v)) < 0.02
    assert close >= 38


def test_what_was_not_measured_has_no_part() -> None:
    rng = np.random.default_rng(1)
    x = torch.as_tensor(np.log1p(rng.poisson(20.0, (10, 12)).astype(float)))
    measured = torch.as_tensor(rng.random((10, 12)) < 0.7)
    measured[:, :6] = True
    other = torch.where(measured, x, torch.as_tensor(99.0, dtype=torch.float64))
    for a, b in zip(lower_component(x, measured), lower_component(other, measured), strict=True):
        torch.testing.assert_close(a, b)
    alone = lower_component(x[3:4, measured[3]], torch.ones(1, int(measured[3].sum()), dtype=torch.bool))
    torch.testing.assert_close(lower_component(x, measured)[0][3:4], alone[0])


def test_a_cell_of_equal_counts_is_flat() -> None:
    mean, variance = lower_component(torch.zeros(2, 6, dtype=torch.float64), torch.ones(2, 6, dtype=torch.bool))
    torch.testing.assert_close(mean, torch.full((2,), FLAT[0], dtype=torch.float64))
    torch.testing.assert_close(variance.sqrt(), torch.full((2,), FLAT[1], dtype=torch.float64))


def test_only_new_batches_are_filled_after_surgery() -> None:
    prior = BackgroundPrior(2, 3, empirical=True)
    prior.fill(torch.tensor([[4.0, 8.0, 4.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(prior.mean.rows.detach(), torch.tensor([[2.0] * 3, [FLAT[0]] * 3]))
    torch.testing.assert_close(prior.log_sd.rows.detach().exp(), torch.tensor([[0.5] * 3, [FLAT[1]] * 3]))
    before = prior.mean.rows.detach().clone()
    prior.grow({"batch": ["c"]}, 0, "background")
    prior.fill(torch.tensor([[9.0, 9.0, 9.0]] * 2 + [[1.0, 7.0, 1.0]]))
    assert torch.equal(prior.mean.rows.detach(), before)
    assert prior.mean.new is not None
    torch.testing.assert_close(prior.mean.new.detach(), torch.full((1, 3), 7.0))
    mean, _ = prior(torch.tensor([2, 0]))
    torch.testing.assert_close(mean.detach(), torch.tensor([[7.0] * 3, [2.0] * 3]))
    prior.settle()
    assert prior.mean.rows.shape == (3, 3)


def test_the_start_does_not_depend_on_the_size_of_the_steps() -> None:
    """Steps are taken whole, so one of 1,024 cells gives more of them than one of 100."""
    per_cell = torch.tensor([2.0, 0.16], dtype=torch.float64)
    found = []
    for n in (100, 256, 1024):
        prior = BackgroundPrior(1, 3, empirical=True)
        prior.fill(torch.cat([torch.ones(1, dtype=torch.float64), per_cell])[None] * n)
        found.append(prior.log_sd.rows.exp())
    torch.testing.assert_close(found[0], torch.full((1, 3), 0.04))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
