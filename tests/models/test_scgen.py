import numpy as np
import torch

from scarcade.engine.contracts import Noise, Step
from scarcade.models.scgen import Scgen
from scarcade.models.surgery import delta, grow, trainable
from tests.models.cells import batch_of, made_batch, made_schema


def made(n: int = 60) -> tuple[Scgen, object]:
    schema = made_schema(25, batches="ab")
    return Scgen(Scgen.Config(hidden_layer_sizes=(16, 8), n_latent=4), schema), made_batch(schema, n)


def test_it_trains_and_every_parameter_has_a_gradient() -> None:
    model, batch = made()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    for step in range(80):
        loss = model.train()(batch, Step(step), Noise.of_step(0, step, batch)).minimise.mean()  # type: ignore[arg-type]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(float(loss.detach()))
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert values[-1] < 0.5 * values[0]


def test_the_loss_does_not_depend_on_the_size_of_the_batch() -> None:
    model, batch = made()
    model.eval()
    whole = model.losses(batch, Step(), None).minimise  # type: ignore[arg-type]
    x = batch.counts.dense(torch.device("cpu"))  # type: ignore[attr-defined]
    part = model.losses(batch_of(x[:7], np.zeros(7)), Step(), None).minimise
    torch.testing.assert_close(whole[:7], part)


def test_expression_is_that_of_scanpy() -> None:
    import anndata as ad
    import scanpy as sc

    model, batch = made()
    x = batch.counts.dense(torch.device("cpu"))  # type: ignore[attr-defined]
    adata = ad.AnnData(x.numpy().copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(model.expression(batch_of(x, np.zeros(60))), adata.X, rtol=1e-5, atol=1e-6)
    assert not model.expression(batch_of(torch.zeros(2, 25), np.zeros(2))).any()  # of empty cells


def test_the_batch_has_no_effect_and_surgery_nothing_to_add() -> None:
    model, batch = made()
    model.eval()
    x = batch.counts.dense(torch.device("cpu"))  # type: ignore[attr-defined]
    a, b = (model.embed(batch_of(x, np.full(60, code)))[0] for code in (0, 1))
    assert torch.equal(a, b)
    schema = made_schema(25, batches="abc")
    grown = grow(model, schema, seed=0)
    assert not trainable(grown)
    assert not delta(grown)
    assert torch.equal(grown.embed(batch_of(x, np.full(60, 2)))[0], a)
    assert "trains nothing" in str(model.surgery_notice)
