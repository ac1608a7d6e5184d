"""Layers side by side: the same function as one-hot columns, and what grows of them."""

import pytest
import torch

from scarcade.engine.errors import UsageError
from scarcade.models.layers import ConditionRows, seeded
from scarcade.models.scarches_layers import (
    ScarchesConfig,
    SplitLinear,
    Stack,
    covariate_sizes,
    log_normalised,
)
from scarcade.models.trvae import Trvae
from tests.models.cells import made_schema

CODES = {"batch": torch.tensor([0, 2, 1, 2])}


def test_split_linear_is_two_layers_side_by_side() -> None:
    layer = SplitLinear(5, 3, {"batch": 3}, seeded(0), bias=False)
    x = torch.randn(4, 5)
    table = layer.conditions["batch"]
    assert isinstance(table, ConditionRows)
    one_hot = torch.nn.functional.one_hot(CODES["batch"], 3).float()
    torch.testing.assert_close(layer(x, CODES), x @ layer.weight.T + one_hot @ table.rows)
    assert layer.bias is None


def test_rows_of_a_new_category_do_not_depend_on_the_others() -> None:
    def grown(new: tuple[str, ...]) -> torch.Tensor:
        layer = SplitLinear(5, 3, {"batch": 1}, seeded(0), bias=True)
        layer.grow({"batch": new}, 7, "encoder.trunk.first")
        table = layer.conditions["batch"]
        assert isinstance(table, ConditionRows)
        assert table.new is not None
        return table.new.detach()

    torch.testing.assert_close(grown(("x",))[0], grown(("w", "x"))[1])


def test_a_stack_has_the_layers_of_its_widths() -> None:
    config = ScarchesConfig(norm="batch", dropout_rate=0)
    stack = Stack((6, 8, 4), {"batch": 3}, config, seeded(0), bias=False)
    assert len(stack.norm) == 2
    assert [p.shape for p in stack.hidden.parameters()] == [torch.Size([4, 8])]
    out = stack(torch.randn(4, 6), CODES, None)
    assert out.shape == (4, 4)
    assert (out >= 0).all()


def test_widths_from_a_command_line() -> None:
    assert Trvae.Config.model_validate({"hidden_layer_sizes": "128,64"}).hidden_layer_sizes == (128, 64)


def test_continuous_covariates_have_no_place() -> None:
    with pytest.raises(UsageError, match="cont0"):
        covariate_sizes(made_schema(continuous=1), "trvae")
    assert covariate_sizes(made_schema(categorical=("xyz",)), "trvae") == {"batch": 2, "categorical_0": 3}


def test_an_empty_cell_is_normalised_to_zeros() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    torch.testing.assert_close(log_normalised(x, x.sum(1), 8.0), torch.log1p(torch.tensor([[0.0, 0], [2, 6]])))
