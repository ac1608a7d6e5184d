"""Numbers that are computed from where they stand: the published ones, and of the right distributions."""

import numpy as np
import pytest
from numba import njit

from scarcade.engine import philox

# Random123's known answers of philox4x32-10: counter, key, words
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[np.uint64]:
    return [np.uint64(int(word, 16)) for word in text.split()]


@njit
def four(a, b, c, d, k, m):  # type: ignore[no-untyped-def]
    return philox.four(a, b, c, d, k, m)


def drawn(kind: str, sizes: list[int], draw: int = 0, first: int = 0) -> list[np.ndarray]:
    """A draw of each of several lanes."""
    keys = philox.keys_of([(5, first + lane) for lane in range(len(sizes))])
    bounds = np.cumsum([0, *sizes])
    out = np.full(bounds[-1], np.nan, np.float32)
    getattr(philox, kind)(keys, bounds, draw, out)
    return np.split(out, bounds[1:-1])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_it_is_philox(counter: str, key: str, expected: str) -> None:
    assert list(four(*words(counter), *words(key))) == words(expected)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_lane_has_its_numbers_in_any_company(kind: str) -> None:
    sizes = [1, 2, 3, 4, 5, 63, 64, 65, 0, 1000]
    together = drawn(kind, sizes)
    assert [len(one) for one in together] == sizes
    for lane, size in enumerate(sizes):
        (alone,) = drawn(kind, [size], first=lane)
        assert np.array_equal(alone, together[lane])
        assert np.isfinite(alone).all()


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    (u,) = drawn("uniform", [1_000_003])
    assert u.min() >= 0
    assert u.max() < 1
    counts, _ = np.histogram(u, 64, (0, 1))
    expected = len(u) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.005


def test_normal_numbers_have_their_moments_and_tails() -> None:
    (z,) = drawn("normal", [1_000_002])
    assert z.mean() == pytest.approx(0, abs=0.005)
    assert [(z.astype(float) ** n).mean() for n in (2, 3, 4)] == pytest.approx([1, 0, 3], abs=0.03)
    assert (np.abs(z) > 3).mean() == pytest.approx(0.0027, abs=0.0003)
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 0.005


def test_draws_kinds_lanes_and_seeds_differ() -> None:
    found = [drawn(kind, [4, 4], draw)[lane] for kind in ("uniform", "normal") for draw in (0, 1) for lane in (0, 1)]
    assert len({tuple(one.tolist()) for one in found}) == len(found)
    seeds = [(), (0,), (0, 0), (1, 0), (0, 1), (2**40, 1), (2**63, 1), (-1, 1), (2**64 - 2, 1)]
    assert len({tuple(key) for key in philox.keys_of(seeds).tolist()}) == len(seeds)
    assert philox.keys_of([]).shape == (0, 2)
