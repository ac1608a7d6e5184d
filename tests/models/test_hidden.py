"""The compiled hidden layer gives the numbers of torch's operations, forward and back."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scarcade.engine.contracts import Noise
from scarcade.engine.precision import products_in
from scarcade.models import hidden as module
from scarcade.models.layers import BatchNorm, ConditionalLinear, hidden_units, seeded
from scarcade.models.scarches_layers import PlainLinear

CELLS, INPUTS, UNITS = 70, 40, 300  # more units than a strip has


@dataclass(frozen=True)
class Case:
    """One kind of layer."""

    sizes: dict[str, int]
    norm: str = "none"  # "batch", "running" (batch norm in eval mode), "layer"
    slope: float = 0.0
    dropout_rate: float = 0.0


CASES = {
    "bias": Case({}),
    "batch norm": Case({}, "batch"),
    "running statistics": Case({"batch": 3}, "running", dropout_rate=0.3),
    "one condition": Case({"batch": 3}, "batch", dropout_rate=0.1),
    "two conditions": Case({"batch": 3, "donor": 4}, "batch"),
    "layer norm": Case({"batch": 3}, "layer", dropout_rate=0.2),
    "leaky": Case({}, "batch", slope=0.3, dropout_rate=0.5),
    "leaky layer norm": Case({}, "layer", slope=0.3),
    "leaky without norm": Case({"batch": 2}, slope=0.3),
}


def parts(case: Case, kind: torch.dtype) -> tuple[nn.Module, BatchNorm | None, Tensor, dict[str, Tensor]]:
    layer = ConditionalLinear(INPUTS, UNITS, case.sizes, seeded("layer")).to(kind)
    norm = BatchNorm(UNITS) if case.norm in ("batch", "running") else None
    if norm is not None:
        generator = seeded("norm")
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        norm = norm.to(kind).train(case.norm == "batch")
    x_BI = (torch.randn(CELLS, INPUTS, generator=seeded("x")) + 3).to(kind).requires_grad_()
    generator = seeded("codes")
    codes = {name: torch.randint(n, (CELLS,), generator=generator) for name, n in case.sizes.items()}
    return layer, norm, x_BI, codes


def found(case: Case, kind: torch.dtype, *, known: bool = False) -> dict[str, Tensor]:
    """Units, all gradients, and what batch norm remembers."""
    layer, norm, x_BI, codes = parts(case, kind)
    given: Any = layer
    noise = Noise([((0, lane), CELLS // 2) for lane in range(2)])
    product_BH = F.linear(x_BI, given.weight).detach() if known else None
    y_BH = hidden_units(
        layer,
        None if known else x_BI,
        codes,
        norm=norm,
        layer_norm=case.norm == "layer",
        slope=case.slope,
        noise=noise,
        dropout_rate=case.dropout_rate,
        product_BH=product_BH,
    )
    is_compiled = type(y_BH.grad_fn).__name__ == "_HiddenBackward"
    assert is_compiled == (kind == torch.float32)
    (y_BH * torch.randn(y_BH.shape, generator=seeded("weights")).to(kind)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: p.grad for name, p in [*layer.named_parameters(), *(norm or nn.Module()).named_parameters("norm")]
    }
    told = {"y": y_BH.detach(), "x": x_BI.grad, **gradients}
    if norm is not None:
        told |= {"running mean": norm.running_mean, "running variance": norm.running_var}
    return {name: value for name, value in told.items() if value is not None}


@pytest.mark.parametrize("name", CASES)
def test_units_and_gradients_are_those_of_torch(name: str) -> None:
    compiled, plain = (found(CASES[name], kind) for kind in (torch.float32, torch.float64))
    assert compiled.keys() == plain.keys()
    for what, value in plain.items():
        # batch norm leaves of a bias' gradient only the rounding errors of its parts
        scale = float(plain["weight" if what == "bias" else what].abs().max())
        assert torch.allclose(compiled[what].double(), value, rtol=1e-5, atol=2e-6 * scale), what


@pytest.mark.parametrize("name", ["one condition", "layer norm"])
def test_a_product_that_is_known_is_left_as_it_is(name: str) -> None:
    case = CASES[name]
    whole, known = found(case, torch.float32), found(case, torch.float32, known=True)
    assert torch.allclose(known["y"], whole["y"], atol=1e-5)
    assert torch.allclose(known["conditions.batch.rows"], whole["conditions.batch.rows"], atol=1e-4)
    assert "x" not in known


@pytest.mark.parametrize("name", ["one condition", "layer norm"])
def test_threads_that_share_the_units_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    alone = found(CASES[name], torch.float32)
    monkeypatch.setattr(module, "LARGE", 1)
    try:
        torch.set_num_threads(3)
        shared = found(CASES[name], torch.float32)
    finally:
        torch.set_num_threads(before)
    for what in ("y", "norm.weight", "running mean"):
        if what in alone:
            assert torch.equal(alone[what], shared[what]), what


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_what_is_not_a_number_comes_through(norm: str) -> None:
    layer, batch_norm, x_BI, codes = parts(Case({}, norm), torch.float32)
    with torch.no_grad():
        x_BI[3, 5] = torch.nan
    y_BH = hidden_units(layer, x_BI, codes, norm=batch_norm, layer_norm=norm == "layer")
    assert y_BH[3].isnan().all()


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_numbers_whose_squares_overflow_are_normalised(norm: str) -> None:
    layer, batch_norm, x_BI, codes = parts(Case({}, norm), torch.float32)
    plain = hidden_units(layer, x_BI, codes, norm=batch_norm, layer_norm=norm == "layer")
    given: Any = layer
    with torch.no_grad():
        given.weight *= 1e25
        given.bias *= 1e25
    large = hidden_units(layer, x_BI, codes, norm=batch_norm, layer_norm=norm == "layer")
    # eps means nothing beside such a variance
    assert torch.allclose(large, plain, atol=2e-3 * float(plain.detach().max()))
    large.sum().backward()  # type: ignore[no-untyped-call]
    assert x_BI.grad is not None
    assert x_BI.grad.isfinite().all()


def test_one_cell_and_no_cell_take_the_running_statistics() -> None:
    layer, norm, x_BI, codes = parts(Case({}, "batch"), torch.float32)
    assert norm is not None
    before = norm.running_mean.clone()
    given: Any = layer
    one = hidden_units(layer, x_BI[:1], codes, norm=norm, layer_norm=False)
    assert torch.allclose(one, F.relu(norm(given(x_BI[:1], codes))), atol=1e-6)
    none = hidden_units(layer, x_BI[:0], codes, norm=norm, layer_norm=False)
    none.sum().backward()  # type: ignore[no-untyped-call]
    assert none.shape == (0, UNITS)
    assert torch.equal(norm.running_mean, before)


def test_a_code_without_a_row_is_refused() -> None:
    layer, norm, x_BI, codes = parts(CASES["one condition"], torch.float32)
    for wrong in (3, -1):
        codes["batch"][7] = wrong
        with pytest.raises(IndexError, match="3 rows"):
            hidden_units(layer, x_BI, codes, norm=norm, layer_norm=False)


def test_a_large_product_is_in_the_kind_that_is_asked_for() -> None:
    layer = PlainLinear(600, 200, seeded("large"))
    x_BI = torch.randn(50, 600, generator=seeded("x"), requires_grad=True)
    exact = hidden_units(layer, x_BI, {}, norm=None, layer_norm=False)
    with products_in(torch.bfloat16):
        rounded = hidden_units(layer, x_BI, {}, norm=None, layer_norm=False)
    rounded.sum().backward()  # type: ignore[no-untyped-call]
    difference = float((rounded - exact).detach().abs().max())
    assert 1e-6 < difference < 0.05
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
