"""Bayes factors of programs against the formula, cell by cell."""

import math

import numpy as np
import pytest

from scarcade.models.enrichment import compare_groups, of_pairs


def test_the_formula_pair_by_pair() -> None:
    rng = np.random.default_rng(0)
    mean_0, mean_1 = rng.normal(size=(2, 50, 3)).astype(np.float32)
    variance_0, variance_1 = rng.gamma(2.0, 1.0, (2, 50, 3)).astype(np.float32)
    found = of_pairs(mean_0, variance_0, mean_1, variance_1)
    for program in range(3):
        p = 0.0
        for i in range(50):
            above = float(mean_1[i, program]) - float(mean_0[i, program])
            spread = math.sqrt(2 * (float(variance_0[i, program]) + float(variance_1[i, program])))
            p += 0.5 * math.erfc(above / spread) / 50
        assert found.p_h0[program] == pytest.approx(p, rel=1e-9)
        assert found.p_h1[program] == pytest.approx(1 - p, rel=1e-9)
        assert found.bayes_factor[program] == pytest.approx(math.log(p + 1e-12) - math.log(1 - p + 1e-12), rel=1e-9)


def test_directions_turn_the_sign_and_silent_programs_are_zero() -> None:
    rng = np.random.default_rng(1)
    mean = np.concatenate([rng.normal(2, 1, (200, 3)), rng.normal(0, 1, (300, 3))]).astype(np.float32)
    mean[:, 2] = 0
    variance = np.full_like(mean, 0.1)
    rows = np.arange(200), np.arange(200, 500)
    plain = compare_groups(mean, variance, *rows)
    turned = compare_groups(mean, variance, *rows, directions=np.array([1, -1, 1]))
    assert plain.bayes_factor[0] > 1
    assert plain.bayes_factor[2] == plain.p_h0[2] == plain.p_h1[2] == 0
    assert turned.bayes_factor[0] == plain.bayes_factor[0]
    assert turned.bayes_factor[1] == pytest.approx(-plain.bayes_factor[1])
    again = compare_groups(mean, variance, *rows)
    assert np.array_equal(plain.bayes_factor, again.bayes_factor)
    off = compare_groups(mean, variance, *rows, directions=np.array([0, 1, 1]))
    assert off.bayes_factor[0] == 0
