"""HSIC against numbers of scArches, and where the original overflows."""

import pytest
import torch

from scarcade.models.hsic import hsic, kernel, width_factor

Z = [
    *([-1.1258398, -1.1523602, 0.5666506], [0.7935084, 0.5988395, -1.5550951], [-0.3413604, 1.8530061, 0.4680964]),
    *([-0.1577124, -0.1733968, 0.1834779], [1.3893662, 1.5863342, 0.9462984], [-0.8436767, 0.9318266, 1.2590092]),
]
S = [
    *([0.4087158, 1.4214180], [0.1493970, -0.6708601], [-0.2141861, -0.4319689]),
    *([-0.7078777, -0.1064340], [-1.2426917, -0.4762316], [-0.6859185, -1.5051417]),
]


def test_numbers_of_scarches() -> None:
    assert [width_factor(d) for d in (1, 2, 3, 10)] == pytest.approx([0.392699, 0.159155, 0.0981748, 0.0262796], 1e-5)
    assert hsic(torch.tensor(Z), torch.tensor(S)).item() == pytest.approx(0.141400, rel=1e-5)


def test_the_kernel_is_that_of_all_differences() -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) + 50
    wanted = torch.exp(-width_factor(4) * (x[:, None] - x[None]).square().sum(-1))
    torch.testing.assert_close(kernel(x), wanted, rtol=1e-4, atol=1e-6)


def test_many_dimensions_and_constant_parts_are_finite() -> None:
    """The original gives NaN beyond 343 dimensions, and a NaN gradient for a constant latent."""
    x = torch.randn(12, 600, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.zeros(12, 1, requires_grad=True)
    value = hsic(x, y)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.isfinite()
    assert value < 1e-3
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert y.grad is not None
    assert y.grad.isfinite().all()
