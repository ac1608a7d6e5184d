from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Noise, Step
from scarcade.engine.errors import CategoryError, GenesError, UsageError
from scarcade.engine.schema import Categories, Schema
from scarcade.models import MODELS, Scanvi, Scvi
from scarcade.models.distributions import log_normal
from scarcade.models.scanvi import NoiseOfClasses
from scarcade.models.surgery import delta, grow, reference_hash, trainable
from tests.models.cells import made_batch, made_schema


def made(config: dict[str, Any] | None = None, **schema: Any) -> tuple[Scanvi, Batch]:
    """A model of three labels, and cells with labelled ones beside them."""
    known = made_schema(**{"labels": "xyz", **schema})
    model = Scanvi(Scanvi.Config(**{"n_hidden": 12, "n_latent": 4, **(config or {})}), known)
    return model, cells(known)


def cells(schema: Schema, n: int = 16, n_labelled: int = 10) -> Batch:
    beside = made_batch(schema, n_labelled, seed=1)
    beside = replace(beside, labels=torch.arange(n_labelled) % schema.n_labels)
    return replace(made_batch(schema, n), labelled=beside)


def noise_of(batch: Batch) -> Noise:
    return Noise.of_step(0, 1, batch)


def test_it_has_its_name() -> None:
    assert MODELS["scanvi"] is Scanvi
    assert (Scanvi.name, Scanvi.obsm_key, Scanvi.labelled_beside) == ("scanvi", "X_scANVI", True)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"linear_classifier": True},
        {"n_layers": 2, "classifier_layers": 1, "classifier_hidden": 5},
        {"gene_likelihood": "nb"},
    ],
)
def test_every_parameter_trains(config: dict[str, Any]) -> None:
    model, batch = made(config)
    losses = model.losses(batch, Step(), noise_of(batch))
    assert losses.labelled is not None
    assert losses.labelled.shape == (10,)
    (losses.minimise.mean() + losses.labelled.mean()).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_labels_are_needed_and_ln_is_not_offered() -> None:
    with pytest.raises(UsageError, match="needs labels"):
        Scanvi(Scanvi.Config(), made_schema())
    with pytest.raises(ValueError, match="normal"):
        Scanvi.Config.model_validate({"latent_distribution": "ln"})


def test_labels_of_the_cells_do_not_enter_the_elbo() -> None:
    model, batch = made()
    model.eval()
    other = replace(batch, labels=torch.full_like(batch.labels, 2))
    assert torch.equal(model.losses(batch, Step(), None).minimise, model.losses(other, Step(), None).minimise)


def test_the_elbo_is_that_of_a_loop_over_classes() -> None:
    """Against the formula, class after class, with the same noise."""
    model, batch = made({"use_batch_norm": "none", "use_layer_norm": "both"})
    model.eval()
    noise, again = noise_of(batch), noise_of(batch)
    losses = model.losses(batch, Step(kl_weight=0.3), noise)
    with torch.no_grad():
        q = model.encode(batch.counts.dense(torch.device("cpu")), batch)
        z1 = q.mean_BL + q.variance_BL.sqrt() * again.normal(4)
        pi = torch.softmax(model.classifier(z1, None), -1)
        eps = again.normal(3, 4)
        wanted = losses.terms["reconstruction"] + log_normal(z1, q.mean_BL, q.variance_BL).sum(-1)
        for c in range(3):
            codes = {"label": torch.full((16,), c)}
            mean, variance = model.z2_encoder(z1, codes, None)
            z2 = mean + variance.sqrt() * eps[:, c]
            m, v = model.z1_decoder(z2, codes)
            p, n = torch.distributions.Normal(mean, variance.sqrt()), torch.distributions.Normal(0.0, 1.0)
            kl = torch.distributions.kl_divergence(p, n).sum(-1)
            wanted = wanted - pi[:, c] * torch.distributions.Normal(m, v.sqrt()).log_prob(z1).sum(-1)  # type: ignore[no-untyped-call]
            wanted = wanted + 0.3 * pi[:, c] * (kl + (pi[:, c] * 3).log())
    torch.testing.assert_close(losses.minimise.detach(), wanted, rtol=1e-5, atol=1e-4)


def test_noise_of_classes_is_that_of_the_cells() -> None:
    """A cell's noise does not depend on the lanes beside its own."""
    whole = Noise([((0, 0, 0), 3), ((0, 0, 1), 2)])
    alone = Noise([((0, 0, 1), 2)])
    both = NoiseOfClasses(whole, 4).normal(2).view(5, 4, 2)[3:]
    assert torch.equal(both, NoiseOfClasses(alone, 4).normal(2).view(2, 4, 2))
    assert NoiseOfClasses(whole, 4).dropout(torch.ones(20, 6), 0.5).shape == (20, 6)


def test_few_labelled_cells_are_enough() -> None:
    """A worker's share may be one cell, or none."""
    model, batch = made()
    for n in (1, 0):
        one = made_batch(model.schema, n) if n else _none(batch)
        few = replace(batch, labelled=replace(one, labels=torch.zeros(n, dtype=torch.int64)))
        losses = model.train().losses(few, Step(), noise_of(few))
        assert losses.labelled is not None
        assert losses.labelled.sum().isfinite()
        (losses.minimise.sum() + losses.labelled.sum()).backward()  # type: ignore[no-untyped-call]


def _none(batch: Batch) -> Batch:
    from tests.models.cells import batch_of

    return batch_of(np.zeros((0, batch.counts.shape[1])), np.zeros(0))


def test_predictions_are_probabilities_of_the_references_classes() -> None:
    model, batch = made()
    model.eval()
    found = model.predict_labels(batch)
    assert found.shape == (16, 3)
    torch.testing.assert_close(found.sum(-1), torch.ones(16))
    assert model.classifies
    with pytest.raises(UsageError, match="no classifier"):
        Scvi(Scvi.Config(), model.schema).predict_labels(batch)


def test_it_starts_from_scvi() -> None:
    schema = made_schema(labels="xyz")
    first = Scvi(Scvi.Config(n_hidden=12, n_latent=4, gene_likelihood="nb"), replace(schema, labels=()), seed=3)
    shared = Scanvi.config_from(first)
    assert shared["gene_likelihood"] == "nb"
    model = Scanvi(Scanvi.Config(**shared), schema, seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.start_from(first)
    state = model.state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(state[name], tensor)
    assert torch.equal(state["classifier.head.weight"], before["classifier.head.weight"])
    batch = made_batch(schema)
    assert torch.equal(model.eval().embed(batch)[0], first.eval().embed(batch)[0])


def test_it_starts_from_nothing_that_does_not_fit() -> None:
    schema = made_schema(labels="xyz")
    model = Scanvi(Scanvi.Config(), schema)
    with pytest.raises(GenesError, match="other genes"):
        model.start_from(Scvi(Scvi.Config(), made_schema(31)))
    with pytest.raises(CategoryError, match="the same batch"):
        model.start_from(Scvi(Scvi.Config(), made_schema(batches="abc")))
    with pytest.raises(CategoryError, match="the same labels"):
        model.start_from(Scanvi(Scanvi.Config(), made_schema(labels="xy")))
    with pytest.raises(UsageError, match="ln"):
        Scanvi.config_from(Scvi(Scvi.Config(latent_distribution="ln"), schema))
    with pytest.raises(UsageError, match="cannot start from"):
        Scvi.config_from(model)


def test_epochs_after_scvi() -> None:
    assert Scanvi.training_defaults(1000) == {}
    assert Scanvi.training_defaults(1000, started=True) == {"optim": {"epochs": 10}}
    assert Scanvi.training_defaults(10**6, started=True) == {"optim": {"epochs": 3}}


@pytest.mark.parametrize("labelled", [10, 3, 0])
def test_surgery_moves_the_new_rows_alone(labelled: int) -> None:
    """Fully, partly and not labelled queries; the number of classes stays that of the reference."""
    model, _ = made({"encode_covariates": True})
    schema = replace(model.schema, batch=Categories("batch", ("a", "b", "q")))
    grown = grow(model, schema, seed=0)
    assert trainable(grown).keys() == delta(grown).keys()
    before = reference_hash(grown)
    batch = made_batch(schema, 20, first_batch=2)
    if labelled:
        beside = made_batch(schema, labelled, seed=1, first_batch=2)
        batch = replace(batch, labelled=replace(beside, labels=torch.arange(labelled) % 2))  # a class is missing
    optimiser = torch.optim.Adam(trainable(grown).values(), lr=0.1)
    grown.train()
    for _ in range(3):
        optimiser.zero_grad()
        losses = grown.losses(batch, Step(), noise_of(batch))
        loss = losses.minimise.mean() + (losses.labelled.mean() if losses.labelled is not None else 0.0)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert reference_hash(grown) == before
    assert grown.predict_labels(batch).shape == (20, 3)
