import pytest
import torch

from scarcade.models.layers import seeded
from scarcade.models.products import NARROW, product_of, rows_times, rows_times_into

SIZES = (1, 2, 5, 7, 10, 11, 12, 33)


@pytest.mark.parametrize("n_columns", SIZES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_row_has_the_same_bits_whatever_the_others_are(n_columns: int, *, turned: bool) -> None:
    generator = seeded("rows")
    for n_inputs in (3, 7, 10, 16, 33, 128):
        x_BI = torch.randn(160, n_inputs, generator=generator)
        right_IH = torch.randn(n_inputs, n_columns, generator=generator)
        right_IH = right_IH.T.contiguous().T if turned else right_IH
        whole_BH = rows_times(x_BI, right_IH)
        torch.testing.assert_close(whole_BH, x_BI @ right_IH)
        for n in (32, 33, 35, 47, 64, 101, 159):
            assert torch.equal(rows_times(x_BI[:n].clone(), right_IH), whole_BH[:n])
            assert torch.equal(rows_times(x_BI[-n:].clone(), right_IH), whole_BH[-n:])


@pytest.mark.parametrize("n_columns", SIZES)
def test_into(n_columns: int) -> None:
    x_BI, right_IH = torch.randn(40, 20), torch.randn(20, n_columns)
    out_BH = torch.full((40, n_columns), torch.nan)
    rows_times_into(out_BH, x_BI, right_IH)
    torch.testing.assert_close(out_BH, x_BI @ right_IH)
    rows_times_into(out_BH, x_BI, right_IH, add=True)
    torch.testing.assert_close(out_BH, 2 * x_BI @ right_IH)


@pytest.mark.parametrize("plus", [None, (), (50,)])
@pytest.mark.parametrize(("n_inputs", "n_outputs"), [(5, 30), (30, 5), (4, NARROW - 1), (NARROW, NARROW)])
def test_gradients(n_inputs: int, n_outputs: int, plus: tuple[int, ...] | None) -> None:
    x_BI = torch.randn(50, n_inputs, dtype=torch.float64, requires_grad=True)
    weight_HI = torch.randn(n_outputs, n_inputs, dtype=torch.float64, requires_grad=True)
    added = None if plus is None else torch.randn(*plus, n_outputs, dtype=torch.float64, requires_grad=True)
    given = [x_BI, weight_HI, *([] if added is None else [added])]
    weight_BH = torch.randn(50, n_outputs, dtype=torch.float64)
    wanted = x_BI @ weight_HI.T + (0 if added is None else added)
    found = product_of(x_BI, weight_HI, added)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad((found * weight_BH).sum(), given),
        torch.autograd.grad((wanted * weight_BH).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
