from typing import Any

import numpy as np
import pytest

from scarcade.engine.errors import UsageError
from scarcade.jobs.tune_domain import Choice, Range, domain_of


def many(given: dict[str, list[Any]], n: int = 300) -> list[Any]:
    domain = domain_of("optim.lr", given)
    rng = np.random.default_rng(0)
    return [domain.drawn(rng) for _ in range(n)]


def test_values_lie_in_their_domain() -> None:
    assert set(many({"choice": ["a", 2, True]})) == {"a", 2, True}
    assert set(many({"randint": [1, 3]})) == {1, 2, 3}
    assert set(many({"quniform": [0.1, 0.4, 0.1]})) == {0.1, 0.2, 0.3, 0.4}
    assert set(many({"quniform": [0.15, 0.5, 0.2]})) == {0.2, 0.4}
    uniform, log = many({"uniform": [2, 4]}), many({"loguniform": [1e-4, 1]})
    assert all(isinstance(value, float) and 2 <= value <= 4 for value in uniform)
    assert all(isinstance(value, float) and 1e-4 <= value <= 1 for value in log)
    assert 0.35 < np.mean([value < 1e-2 for value in log]) < 0.65  # half of the logarithms
    whole = many({"lograndint": [1, 100]})
    assert all(isinstance(value, int) for value in whole)
    assert np.median(whole) < 20


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([1, 2], r"\[space\] optim.lr: wants one of \{choice = \[values\]\}"),
        ({"choice": []}, r"choice wants \[values\]"),
        ({"choice": [1, 1]}, "holds a value twice"),
        ({"chioce": [1]}, "there is no kind 'chioce'; there are choice, grid"),
        ({"uniform": [1]}, r"uniform wants \[low, high\], numbers"),
        ({"uniform": [1, "2"]}, "numbers"),
        ({"uniform": [2, 1]}, "the low end of uniform must be below the high end"),
        ({"loguniform": [0, 1]}, "a low end above 0"),
        ({"loguniform": [1e-3, float("inf")]}, "numbers"),
        ({"randint": [1.5, 2]}, "whole numbers"),
        ({"quniform": [0, 1, 2]}, "the step of quniform"),
        ({"uniform": [0, 1], "choice": [1]}, "wants one of"),
    ],
)
def test_what_cannot_be_meant_is_told_with_its_field(given: object, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        domain_of("optim.lr", given)


def test_a_perturbed_value_stays_in_its_domain() -> None:
    rng = np.random.default_rng(0)
    span = Range(1.0, 1.1)
    assert {span.perturbed(1.05, rng) for _ in range(20)} == {1.0, 1.1}
    choice = Choice((1, 2, 3))
    assert {choice.perturbed(2, rng) for _ in range(20)} == {1, 3}
    assert {choice.perturbed(3, rng) for _ in range(20)} == {2, 3}
