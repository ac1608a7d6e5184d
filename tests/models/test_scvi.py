from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Model, Noise, Step
from scarcade.engine.errors import CategoryError, UsageError
from scarcade.models import MODELS, RECIPES, Scvi
from scarcade.models import outputs as out
from tests.models.cells import batch_of, made_batch, made_schema

CONFIGS: list[dict[str, Any]] = [
    {},
    RECIPES["scarches"],
    {"gene_likelihood": "nb", "use_observed_lib_size": False, "encode_covariates": True},
    {"dispersion": "gene-batch", "n_layers": 2},
    {"dispersion": "gene-cell", "gene_likelihood": "nb"},
    {"gene_likelihood": "poisson", "use_batch_norm": "encoder", "use_layer_norm": "decoder"},
    {"gene_likelihood": "normal", "log_variational": False},
    {"latent_distribution": "ln", "deeply_inject_covariates": False, "n_layers": 3},
]


def small(config: dict[str, Any], **schema: Any) -> tuple[Scvi, Any]:
    made = made_schema(25, **schema)
    model = Scvi(Scvi.Config(**{"n_hidden": 12, "n_latent": 4, **config}), made)
    batch = made_batch(made, 40)
    model.observe([batch])
    return model, batch


@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_has_a_gradient(config: dict[str, Any]) -> None:
    """Distributed data parallel would wait for one that has none."""
    model, batch = small(config, categorical=("xyz",), continuous=2)
    losses = model(batch, Step(kl_weight=0.5), Noise.of_step(0, 0, batch))
    losses.minimise.mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
    assert all(torch.isfinite(term).all() and term.shape == (40,) for term in losses.terms.values())


def test_it_keeps_the_contract() -> None:
    assert isinstance(small({})[0], Model)
    assert MODELS["scvi"] is Scvi
    assert (Scvi.name, Scvi.obsm_key) == ("scvi", "X_scVI")


def test_the_kl_weight_weighs_the_kl_alone() -> None:
    model, batch = small({"use_observed_lib_size": False})
    model.eval()
    full, half = (model.losses(batch, Step(kl_weight=w), None) for w in (1.0, 0.5))
    torch.testing.assert_close(full.minimise - half.minimise, 0.5 * full.terms["kl"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(full.terms["elbo"], half.terms["elbo"])
    torch.testing.assert_close(full.terms["elbo"], full.minimise)


def test_first_weights_depend_on_the_seed_alone() -> None:
    schema = made_schema(10)
    a, b, c = (Scvi(Scvi.Config(), schema, seed=s).state_dict() for s in (0, 0, 1))
    torch.randn(3)  # the global generator plays no part
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_training_lowers_the_loss_by_every_path() -> None:
    schema = made_schema(25)
    batch = made_batch(schema, 60)
    ends = {}
    for path in ("eager", "analytic", "auto"):
        model = Scvi(Scvi.Config(n_hidden=12, n_latent=4, likelihood_path=path), schema)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        values = []
        for step in range(30):
            loss = model(batch, Step(step), Noise.of_step(0, step, batch)).minimise.mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            values.append(loss.item())
        assert values[-1] < 0.9 * values[0]
        ends[path] = values[-1]
    np.testing.assert_allclose(ends["auto"], ends["eager"], rtol=1e-3)
    np.testing.assert_allclose(ends["analytic"], ends["eager"], rtol=1e-3)


def test_noise_repeats_and_its_absence_is_the_mean() -> None:
    model, batch = small({})
    first, again = (model.losses(batch, Step(), Noise.of_step(0, 3, batch)).minimise for _ in range(2))
    assert torch.equal(first, again)
    model.eval()
    assert torch.equal(model.losses(batch, Step(), None).minimise, model.losses(batch, Step(), None).minimise)


def test_the_latent_of_a_cell_does_not_depend_on_its_company() -> None:
    for config in ({}, {"latent_distribution": "ln"}):
        model, batch = small(config)
        model.eval()
        alone = batch_of(batch.counts.dense(torch.device("cpu"))[:5], batch.batch[:5])
        for part, whole in zip(model.embed(alone), model.embed(batch), strict=True):
            torch.testing.assert_close(part, whole[:5], rtol=1e-5, atol=1e-6)
            assert part.shape == (5, 4)


def test_the_logistic_normal_latent_lies_on_the_simplex() -> None:
    model, batch = small({"latent_distribution": "ln"})
    mean, variance = model.eval().embed(batch)
    torch.testing.assert_close(mean.sum(-1), torch.ones(40))
    assert (variance >= 0).all()


def test_batches_are_observed_in_parts_as_in_one() -> None:
    schema = made_schema(25, batches="abc")
    x = made_batch(schema, 60).counts.dense(torch.device("cpu"))
    x[3] = 0  # an empty cell counts as a log library of 0
    codes = np.arange(60) % 2  # batch c has no cells
    model = Scvi(Scvi.Config(use_observed_lib_size=False), schema)
    model.observe([batch_of(x, codes)])
    assert model.library_prior is not None
    mean, variance = model.library_prior.parts()
    total = x.sum(-1).numpy()
    logs = np.where(total > 0, np.log(np.maximum(total, 1)), 0.0)
    for code in (0, 1):
        np.testing.assert_allclose(mean[code], logs[codes == code].mean(), rtol=1e-5)
        np.testing.assert_allclose(variance[code], logs[codes == code].var(), rtol=1e-4)
    assert (mean[2].item(), variance[2].item()) == (0.0, 1.0)

    shards = [batch_of(x[:20], codes[:20]), batch_of(x[20:], codes[20:])]
    parts: list[torch.Tensor] = []
    for shard in shards:  # what two workers would add up
        Scvi(Scvi.Config(use_observed_lib_size=False), schema).observe([shard], lambda sums: parts.append(sums) or sums)  # type: ignore[func-returns-value]
    again = Scvi(Scvi.Config(use_observed_lib_size=False), schema)
    again.observe([], lambda _: parts[0] + parts[1])
    assert again.library_prior is not None
    torch.testing.assert_close(again.library_prior.parts()[0], mean)
    assert not Scvi(Scvi.Config(), schema).observes
    assert again.observes


def test_an_empty_cell_has_a_finite_loss() -> None:
    model, _ = small({})
    x = torch.zeros(4, 25)
    losses = model.eval().losses(batch_of(x, np.zeros(4)), Step(), None)
    assert torch.isfinite(losses.minimise).all()


def test_transform_batch_decodes_as_another_batch() -> None:
    model, batch = small({"dispersion": "gene-batch"}, batches="abc")
    model.eval()
    other = replace(batch, batch=torch.full_like(batch.batch, 2))
    (found,), (wanted,) = out.decoded(model, batch, None, (2,)), out.decoded(model, other, None)
    assert torch.equal(found.rate_BG, wanted.rate_BG)
    assert found.log_theta is not None
    assert wanted.log_theta is not None
    assert torch.equal(found.log_theta, wanted.log_theta)
    mean = out.normalised_expression(model, batch, None, transform_batch=(0, 2))
    parts = [out.normalised_expression(model, batch, None, transform_batch=(code,)) for code in (0, 2)]
    torch.testing.assert_close(mean, (parts[0] + parts[1]) / 2)
    torch.testing.assert_close(mean.sum(-1), torch.ones(40))


def test_outputs() -> None:
    model, batch = small({"use_observed_lib_size": False})
    model.eval()
    noise = Noise.of_step(0, 0, batch)
    assert set(out.likelihood_parameters(model, batch, noise)) == {"mean", "dispersions", "dropout"}
    drawn = out.predictive_sample(model, batch, noise, torch.Generator().manual_seed(0))
    assert drawn.shape == (40, 25)
    assert (drawn == drawn.round()).all()
    assert (out.library_size(model, batch) > 0).all()
    elbo = -out.loss_terms(model, batch, noise)["elbo"].mean()
    assert float(out.marginal_log_likelihood(model, batch, noise, 50).mean()) > float(elbo)
    observed, batch = small({})
    with pytest.raises(UsageError, match="give_mean"):
        out.library_size(observed, batch)
    torch.testing.assert_close(
        out.library_size(observed, batch, mean=False), batch.counts.dense(observed.device).sum(-1)
    )


def test_gene_label_dispersion_takes_unlabelled_cells() -> None:
    model, batch = small({"dispersion": "gene-label"}, labels="uv")
    assert (batch.labels < 0).any()
    assert torch.isfinite(model.losses(batch, Step(), None).minimise).all()
    with pytest.raises(UsageError, match="label"):
        Scvi(Scvi.Config(dispersion="gene-label"), made_schema(5))


def test_size_factors_are_asked_for() -> None:
    schema = replace(made_schema(25), size_factor="size")
    model = Scvi(Scvi.Config(), schema)
    batch = made_batch(schema, 8)
    assert torch.isfinite(model.losses(batch, Step(), None).minimise).all()
    with pytest.raises(CategoryError, match="size factor 'size'"):
        model.losses(replace(batch, size_factor=None), Step(), None)


def test_fused_that_cannot_be_is_an_error_and_never_another_path() -> None:
    model, batch = small({"gene_likelihood": "poisson", "likelihood_path": "fused"})
    with pytest.raises(UsageError, match="fused"):
        model.losses(batch, Step(), None)


def test_a_model_that_surgery_cannot_move_says_so() -> None:
    assert "recipe scarches" in str(small({})[0].surgery_notice)
    assert small(RECIPES["scarches"])[0].surgery_notice is None
