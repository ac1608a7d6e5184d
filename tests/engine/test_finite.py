import pytest
import torch

from scarcade.engine import finite


def gradients() -> list[torch.Tensor]:
    return [torch.ones(3), torch.ones(2, finite.LARGE), torch.ones(()), torch.ones(5, 4).T]


def test_it_is_finite_where_the_norm_is() -> None:
    assert float(finite.finite_where(gradients())) == 3 + 2 * finite.LARGE + 1 + 20
    assert finite.finite_where([]).isfinite()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(4))
def test_one_number_is_enough(place: int, value: float) -> None:
    given = gradients()
    given[place][(-1,) * given[place].dim()] = value
    assert not finite.finite_where(given).isfinite()
    assert not torch.nn.utils.get_total_norm(given).isfinite()
