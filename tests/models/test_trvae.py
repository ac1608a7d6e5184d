"""trVAE: its losses, what trains, what surgery adds."""

from typing import Any

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Noise, Step
from scarcade.engine.errors import UsageError
from scarcade.models.mmd import mmd
from scarcade.models.surgery import delta, grow, reference_hash, trainable
from scarcade.models.trvae import Trvae
from tests.models.cells import batch_of, made_batch, made_schema

SCHEMA = made_schema(30, batches="abc", categorical=("xy",))


def model_of(**config: Any) -> Trvae:
    return Trvae(Trvae.Config(hidden_layer_sizes=(16, 12), n_latent=4, **config), SCHEMA, seed=0)


def noise_of(batch: Batch, seed: int = 0) -> Noise:
    return Noise([((seed,), len(batch))])


@pytest.mark.long
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("recon_loss", ["nb", "zinb", "mse"])
def test_it_learns_and_every_weight_has_a_gradient(recon_loss: str, norm: str) -> None:
    model, batch = model_of(recon_loss=recon_loss, norm=norm), made_batch(SCHEMA, 48)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    history = []
    for step in range(30):
        optimiser.zero_grad()
        losses = model(batch, Step(step), noise_of(batch, step))
        assert losses.penalty is not None
        loss = losses.minimise.mean() + losses.penalty
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
        history.append(float(losses.terms["reconstruction"].detach().mean()))
    assert history[-1] < history[0]


def test_the_penalty_is_the_mmd_of_what_is_asked_for() -> None:
    batch = made_batch(SCHEMA, 24)
    z, y = model_of(beta=2.0).eval(), model_of(beta=2.0, mmd_on="y").eval()
    x = batch.counts.dense(torch.device("cpu"))
    mean, _ = z.encode(x.sum(1), batch)
    on_z, on_y = z.losses(batch, Step(), None), y.losses(batch, Step(), None)
    assert on_z.penalty is not None
    assert on_y.penalty is not None
    torch.testing.assert_close(on_z.penalty, 2 * mmd(mean, batch.batch))
    torch.testing.assert_close(on_y.penalty, 2 * mmd(y.decode(mean, batch).first_BH, batch.batch))
    torch.testing.assert_close(on_z.terms["mmd"], on_z.penalty.expand(24))
    assert model_of(use_mmd=False).losses(batch, Step(), None).penalty is None


def test_the_weight_of_the_kl() -> None:
    batch, model = made_batch(SCHEMA), model_of().eval()
    half, none = (model.losses(batch, Step(kl_weight=w), None) for w in (0.5, 0.0))
    torch.testing.assert_close(half.minimise - none.minimise, 0.5 * half.terms["kl"])
    torch.testing.assert_close(half.terms["elbo"], half.terms["reconstruction"] + half.terms["kl"])


def test_an_empty_cell_has_a_loss_and_a_latent() -> None:
    batch = batch_of(torch.zeros(3, 30), torch.arange(3), categorical=np.array([[0], [1], [0]]))
    for recon_loss in ("nb", "zinb", "mse"):
        model = model_of(recon_loss=recon_loss)
        losses = model.losses(batch, Step(), None)
        assert losses.minimise.isfinite().all()
        losses.minimise.sum().backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert all(part.isfinite().all() for part in model.embed(batch))


def test_depth_does_not_reach_the_encoder_of_normalised_counts() -> None:
    batch = made_batch(SCHEMA, 8)
    assert batch.categorical is not None
    codes = batch.categorical.numpy()
    deeper = batch_of(batch.counts.dense(torch.device("cpu")) * 3, batch.batch, categorical=codes)
    model = model_of(normalise_input=True).eval()
    torch.testing.assert_close(model.embed(batch)[0], model.embed(deeper)[0])


def test_other_batches_are_decoded_as_asked() -> None:
    batch, model = made_batch(SCHEMA, 8), model_of().eval()
    assert batch.categorical is not None
    z, codes = torch.randn(8, 4), batch.categorical.numpy()
    as_c = model.decode(z, batch, transform_batch=2).scale_BG
    of_c = batch_of(torch.zeros(8, 30), torch.full((8,), 2), categorical=codes)
    torch.testing.assert_close(as_c, model.decode(z, of_c).scale_BG)


def test_surgery_moves_rows_of_new_conditions_alone() -> None:
    model = model_of(recon_loss="zinb")
    schema = made_schema(30, batches="abcde", categorical=("xyz",))
    grown, before = grow(model, schema, seed=0), reference_hash(model)
    assert trainable(grown).keys() == delta(grown).keys()
    assert all(name.endswith(".new") for name in trainable(grown))
    assert len(trainable(grown)) == 5
    old = made_batch(SCHEMA, 12)
    torch.testing.assert_close(model.eval().embed(old)[0], grown.embed(old)[0], rtol=0, atol=0)
    new = made_batch(schema, 32, first_batch=3)
    optimiser = torch.optim.Adam(trainable(grown).values(), lr=0.01, weight_decay=0.04)
    for _ in range(5):
        losses = grown.losses(new, Step(), None)
        assert losses.penalty is not None
        (losses.minimise.mean() + losses.penalty).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert reference_hash(grown) == before
    torch.testing.assert_close(model.embed(old)[0], grown.embed(old)[0], rtol=0, atol=0)


def test_first_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (Trvae(Trvae.Config(), SCHEMA, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.scale.weight, other.scale.weight)


def test_log_expression_has_no_library_size() -> None:
    batch = made_batch(SCHEMA)
    expression = model_of(recon_loss="mse").eval().outputs["expression"].of
    for size in (2.0, "latent"):
        with pytest.raises(UsageError, match="recon-loss mse"):
            expression(model_of(recon_loss="mse").eval(), batch, None, library_size=size)
    assert expression(model_of(recon_loss="mse").eval(), batch, None).shape == (len(batch), 30)
    counts = model_of().eval()
    torch.testing.assert_close(
        expression(counts, batch, None, library_size=2.0), 2 * expression(counts, batch, None), rtol=1e-6, atol=0
    )


def test_the_fused_likelihood_is_refused_for_mse() -> None:
    with pytest.raises(UsageError, match="likelihood-path fused"):
        model_of(recon_loss="mse", likelihood_path="fused")
