"""Products in bfloat16 are an option of the engine, so every model must take them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from scarcade.engine.contracts import Step
from scarcade.engine.precision import products, products_in
from scarcade.engine.schema import Categories, Schema
from scarcade.models import MODELS
from scarcade.models.products import WIDE
from tests.every_model import ALL_PARTS, EVERY
from tests.models.cells import batch_of

GENES, CELLS, HIDDEN = 800, 40, 128


@pytest.mark.parametrize("name", EVERY)
def test_every_model_computes_its_large_products_in_it(name: str) -> None:
    assert GENES * HIDDEN > WIDE
    proteins = tuple(f"p{i}" for i in range(4)) if MODELS[name].sees_proteins else ()
    labels = Categories("label", ("A", "B"))
    schema = Schema(
        tuple(f"g{i}" for i in range(GENES)), Categories("batch", ("b0", "b1")), (labels,), proteins=proteins
    )
    fields = MODELS[name].Config.model_fields
    wide = {"n_hidden": HIDDEN, "hidden_layer_sizes": [HIDDEN]}
    settings: dict[str, Any] = {field: value for field, value in wide.items() if field in fields}
    settings |= ALL_PARTS[name](schema) if name in ALL_PARTS else {}
    model = MODELS[name](MODELS[name].Config.model_validate(settings), schema).train()
    g = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.rand(CELLS, GENES, generator=g), generator=g)
    code = torch.arange(CELLS) % 2
    batch = batch_of(x, code, labels=code.numpy())
    if proteins:
        measured = torch.ones(CELLS, len(proteins), dtype=torch.bool)
        batch = replace(batch, proteins=torch.ones(CELLS, len(proteins)), proteins_measured=measured)
    found = []
    for kind in (torch.float32, torch.bfloat16):
        with products_in(kind):
            assert products() == kind
            losses = model.losses(batch, Step(), None)
        model.zero_grad()
        losses.minimise.mean().backward()  # type: ignore[no-untyped-call]
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((losses.minimise.detach(), gradients))
    (exact, wanted), (near, rounded) = found
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, rtol=0.02, atol=1e-3)
    assert not torch.equal(near, exact)
    large = [n for n, grad in wanted.items() if grad.dim() == 2 and GENES in grad.shape and "rows" not in n]
    assert large
    for n in large:
        assert not torch.equal(rounded[n], wanted[n]), n
        assert float((rounded[n] - wanted[n]).norm()) < 0.1 * float(wanted[n].norm()), n  # of 40 cells
