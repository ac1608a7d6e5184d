"""The product of a first layer with counts without their zeros: that of the dense matrix, and its gradient."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scarcade.engine.contracts import Noise, Step
from scarcade.engine.precision import products_in
from scarcade.models import MODELS, scarches_layers, scvi, totalvi
from scarcade.models.sparse import Sparse
from scarcade.models.sparse_product import CELLS, DENSITY, SeenCounts, without_zeros
from tests.models.cells import DenseCounts, made_batch, made_schema


def counts(n_cells: int, n_genes: int, density: float = 0.15, seed: int = 0) -> Sparse:
    random = np.random.default_rng(seed)
    dense = random.integers(1, 3000, (n_cells, n_genes)) * (random.random((n_cells, n_genes)) < density)
    dense[n_cells // 2] = 0  # a cell without counts
    dense[:, n_genes // 3] = 0  # a gene nobody has
    return Sparse.of(torch.from_numpy(dense.astype(np.float32)))


def weights(n_units: int, n_inputs: int) -> Tensor:
    return torch.randn(n_units, n_inputs, generator=torch.Generator().manual_seed(1), requires_grad=True)


def worth(x: Tensor | Sparse, weight_HI: Tensor) -> bool:
    untouched: Any = None  # the batch: x was taken from it
    return without_zeros(untouched, x, weight_HI) is not None


@pytest.mark.parametrize("n_units", [16, 48, 128, 240, 272])
@pytest.mark.parametrize(("n_cells", "n_genes"), [(64, 7), (70, 64), (100, 1061), (65, 2503)])
@pytest.mark.parametrize("beside", [0, 3])
def test_product_and_gradient_are_those_of_the_dense_matrix(
    n_units: int, n_cells: int, n_genes: int, beside: int
) -> None:
    more_BC = torch.rand(n_cells, beside) if beside else None
    x = SeenCounts.logs(counts(n_cells, n_genes), more_BC)
    weight_HI, d_BH = weights(n_units, n_genes + beside).detach(), torch.randn(n_cells, n_units)
    dense_BI = x.dense()
    assert dense_BI.shape == (n_cells, n_genes + beside)
    torch.testing.assert_close(x.times(weight_HI), dense_BI @ weight_HI.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x.gradient(d_BH), d_BH.T @ dense_BI, rtol=1e-4, atol=1e-3)


def test_sums_have_one_order_whatever_the_number_of_threads() -> None:
    x, weight_HI, d_BH = SeenCounts.logs(counts(512, 2000)), weights(128, 2000).detach(), torch.randn(512, 128)
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append((x.times(weight_HI), x.gradient(d_BH)))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert torch.equal(one[0], found[0][0])
        assert torch.equal(one[1], found[0][1])


def test_logs_are_those_of_any_number() -> None:
    values = np.array([0, 1, 2, 1e3, 7e4, 3e38, 0.5, 1e-6, 1e-12], np.float32)
    given = Sparse(np.array([0, len(values)]), np.arange(len(values), dtype=np.int32), values, len(values))
    np.testing.assert_allclose(SeenCounts.logs(given).cells.values, np.log1p(values.astype(np.float64)), rtol=3e-7)
    odd = replace(given, values=np.array([1, np.nan, np.inf, -0.5, 0, 0, 0, 0, 0], np.float32))
    found = SeenCounts.logs(odd).cells.values
    np.testing.assert_allclose(found[[0, 3]], np.log([2, 0.5]), rtol=3e-7)
    assert np.isnan(found[1])
    assert np.isinf(found[2])


def test_what_is_not_a_number_stays_none() -> None:
    given = counts(64, 100)
    values = given.values.copy()
    values[5] = np.nan
    product_BH = SeenCounts(replace(given, values=values)).times(weights(16, 100).detach())
    cell = int(np.searchsorted(given.indptr, 5, side="right")) - 1
    assert product_BH[cell].isnan().all()
    assert product_BH.isnan().any(1).sum() == 1


def test_it_is_taken_where_it_is_worth_while_and_possible() -> None:
    given, weight_HI = counts(CELLS, 200), weights(32, 200)
    assert worth(given, weight_HI)
    dense_BG = SeenCounts(given).dense()
    assert without_zeros(DenseCounts(dense_BG), None, weight_HI) is not None  # taken from the batch
    assert not worth(counts(CELLS - 1, 200), weight_HI)
    assert not worth(counts(CELLS, 200, DENSITY + 0.1), weight_HI)
    assert not worth(given, weights(33, 200))
    assert not worth(given, weight_HI.detach())  # frozen: its product is known after the first epoch
    assert not worth(given, weight_HI.double())
    assert not worth(torch.zeros(CELLS, 200), weight_HI)
    with torch.no_grad():
        assert not worth(given, weight_HI)
    large_HI = weights(128, 600)
    with products_in(torch.bfloat16):
        assert not worth(counts(CELLS, 600), large_HI)
    backwards = replace(given, genes=given.genes[::-1].copy())
    assert not worth(backwards, weight_HI)
    assert not worth(replace(given, n_genes=100), weight_HI)  # a gene that has no weights
    assert not worth(replace(given, genes=given.genes - 5), weight_HI)


def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    given = counts(CELLS, 100)
    x = SeenCounts(given)
    for n_inputs in (99, 101):
        with pytest.raises(ValueError, match="inputs for 100"):
            x.times(torch.ones(16, n_inputs))
    with pytest.raises(ValueError, match="weights"):
        x.times(torch.ones(16, 100, dtype=torch.float64))
    with pytest.raises(ValueError, match="gradient of 3 cells"):
        x.gradient(torch.ones(3, 16))
    with pytest.raises(ValueError, match="rows of further columns"):
        SeenCounts(given, torch.ones(3, 1))
    odd: dict[str, Any] = {
        "genes": given.genes.astype(np.int64),
        "values": given.values[::2],
        "indptr": given.indptr + 1,
    }
    for name, part in odd.items():
        with pytest.raises(TypeError, match="wanted"):
            SeenCounts(replace(given, **{name: part}))
    assert not worth(replace(given, n_genes=0), weights(16, 0))


def test_gradients_may_lie_in_any_way() -> None:
    x, d_HB = SeenCounts(counts(CELLS, 100)), torch.randn(32, CELLS)
    torch.testing.assert_close(x.gradient(d_HB.T), d_HB @ x.dense(), rtol=1e-4, atol=1e-2)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "scvi": ("scvi", {}),
    "continuous covariates": ("scvi", {"encode_covariates": True}),
    "counts themselves": ("scvi", {"log_variational": False}),
    "both norms": ("scvi", {"use_layer_norm": "both"}),
    "latent library": ("scvi", {"use_observed_lib_size": False}),
    "scanvi": ("scanvi", {}),
    "totalvi": ("totalvi", {}),
    "trvae": ("trvae", {"hidden_layer_sizes": (64, 32)}),
    "expimap": ("expimap", {"hidden_layer_sizes": (64, 32), "programs": {"a": ["g1", "g2"], "b": ["g3", "g9"]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_trains_by_the_same_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings = CASES[case]
    continuous = 2 if name in ("scvi", "scanvi") else 0
    schema = made_schema(90, batches="abc", labels="xy" if name == "scanvi" else "", continuous=continuous)
    if name == "totalvi":
        schema = replace(schema, proteins=("p0", "p1", "p2"))
    batch = made_batch(schema, CELLS)
    batch.counts.x_BG[torch.rand(batch.counts.shape, generator=torch.Generator().manual_seed(3)) < 0.7] = 0  # type: ignore[attr-defined]
    if name == "totalvi":
        batch = replace(batch, proteins=torch.randint(9, (CELLS, 3)).float())
    if name == "scanvi":
        batch = replace(batch, labelled=replace(batch, labels=batch.labels.clamp(min=0)))
    products = 0

    def counted(self: SeenCounts, weight_HI: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return times(self, weight_HI)

    times = SeenCounts.times
    monkeypatch.setattr(SeenCounts, "times", counted)

    def found() -> dict[str, Tensor]:
        kind = MODELS[name]
        model = kind(kind.Config(**settings), schema, seed=0)
        model.train()
        losses = model.losses(batch, Step(0, 0, 0, 1.0, 1e-3), Noise.of_step(0, 0, batch))
        total = losses.minimise.sum() + (0 if losses.labelled is None else losses.labelled.sum())
        total = total if losses.penalty is None else total + losses.penalty
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        found = {key: one for key, one in zip(named, gradients, strict=True) if one is not None}
        return {"loss": total.detach(), **found}

    sparse = found()
    wanted = {"scanvi": 2, "latent library": 2, "both norms": 0}.get(case, 1)
    assert products == wanted
    for module in (scvi, totalvi, scarches_layers):
        monkeypatch.setattr(module, "without_zeros", lambda counts, x, weight_HI: None)
    dense = found()
    assert products == wanted
    assert sparse.keys() == dense.keys()
    for key, value in dense.items():
        torch.testing.assert_close(sparse[key], value, rtol=2e-4, atol=2e-4 * float(value.abs().max() + 1), msg=key)
