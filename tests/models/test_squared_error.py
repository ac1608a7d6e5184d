"""The squared error as one function is that of torch's operations, with its gradients."""

import pytest
import torch
from torch import Tensor

from scarcade.engine.precision import products_in
from scarcade.models.layers import seeded
from scarcade.models.squared_error import mean_squared_error

GENES, HIDDEN = 700, 100


def found(n_cells: int, kind: torch.dtype) -> list[Tensor]:
    """The error of each cell, and the gradients by hidden units, weights and bias."""
    generator = seeded("error", n_cells)
    x, h, weight, bias, each = (
        torch.randn(shape, generator=generator).to(kind)
        for shape in ((n_cells, GENES), (n_cells, HIDDEN), (GENES, HIDDEN), (GENES,), (n_cells,))
    )
    inputs = [part.requires_grad_() for part in (h, weight, bias)]
    error_B = mean_squared_error(x, *inputs)
    assert (type(error_B.grad_fn).__name__ == "_ErrorBackward") == (kind == torch.float32)
    return [error_B.detach(), *torch.autograd.grad((error_B * each).sum(), inputs)]


@pytest.mark.parametrize("n_cells", [0, 1, 33])
def test_it_is_the_formula_with_its_gradients(n_cells: int) -> None:
    for ours, plain in zip(found(n_cells, torch.float32), found(n_cells, torch.float64), strict=True):
        scale = float(plain.abs().max()) if plain.numel() else 1.0
        assert torch.allclose(ours.double(), plain, rtol=1e-5, atol=2e-6 * scale)


def test_the_product_is_in_the_kind_that_is_asked_for() -> None:
    with products_in(torch.bfloat16):
        rounded = found(33, torch.float32)
    for one, exact in zip(rounded, found(33, torch.float32), strict=True):
        assert one.dtype == torch.float32
        difference = float((one - exact).abs().max() / exact.abs().max())
        assert 1e-5 < difference < 0.02
