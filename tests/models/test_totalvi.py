from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Noise, Step
from scarcade.engine.errors import CategoryError, UsageError
from scarcade.engine.schema import Schema
from scarcade.models import outputs
from scarcade.models import protein_outputs as out
from scarcade.models.distributions import nb_elements, nb_mixture_elements
from scarcade.models.surgery import SurgeryConfig, delta, grow, reference_hash, trainable
from scarcade.models.totalvi import Totalvi
from tests.models.cells import made_batch, made_schema

SMALL = {"n_hidden": 16, "n_latent": 4}


def made(
    config: dict[str, object] | None = None,
    *,
    batches: str = "abc",
    n: int = 60,
    without: int | None = None,
    p: int = 12,
) -> tuple[Totalvi, Batch]:
    """A model and cells, of which those of the batch `without` have no proteins."""
    schema = replace(made_schema(25, batches=batches, labels="uv"), proteins=tuple(f"p{i}" for i in range(p)))
    return Totalvi(Totalvi.Config.model_validate({**SMALL, **(config or {})}), schema), cells(schema, n, without)


def cells(schema: Schema, n: int, without: int | None, seed: int = 0) -> Batch:
    batch = made_batch(schema, n, seed)
    rng = np.random.default_rng(seed)
    high = rng.random((n, len(schema.proteins))) < 0.3
    y = torch.as_tensor(rng.poisson(np.where(high, 50.0, 4.0)).astype(np.float32))
    measured = torch.ones_like(y, dtype=torch.bool)
    if without is not None:
        measured[batch.batch == without] = False
    return replace(batch, proteins=torch.where(measured, y, 0.0), proteins_measured=measured)


def test_the_mixture_of_two_is_the_sum_of_two() -> None:
    y = torch.tensor([[0.0, 3.0, 40.0]])
    low, high, theta = torch.full((1, 3), 2.0), torch.full((1, 3), 30.0), torch.tensor([0.5, 0.1, 1.0])
    mixing = torch.tensor([[0.3, -1.0, 2.0]])
    weight = torch.sigmoid(mixing)
    wanted = torch.log(weight * nb_elements(y, low, theta).exp() + (1 - weight) * nb_elements(y, high, theta).exp())
    torch.testing.assert_close(nb_mixture_elements(y, low, high, theta, mixing), wanted)


def test_every_parameter_has_a_gradient_and_a_start_of_its_own() -> None:
    model, batch = made({"adversary": True, "gene_likelihood": "zinb", "use_observed_lib_size": False}, without=2)
    model.observe([batch])
    losses = model.train()(batch, Step(kl_weight=0.5), Noise.of_step(0, 0, batch))
    losses.minimise.mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    again, _ = made({"adversary": True, "gene_likelihood": "zinb", "use_observed_lib_size": False})
    other = Totalvi(again.config, again.schema, seed=1)
    assert torch.equal(again.mixing.weight, made({"gene_likelihood": "zinb"})[0].mixing.weight)
    assert not torch.equal(again.mixing.weight, other.mixing.weight)


def test_proteins_that_were_not_measured_have_no_part() -> None:
    model, batch = made(without=2)
    model.eval()
    assert batch.proteins is not None
    assert batch.proteins_measured is not None
    odd = replace(batch, proteins=torch.where(batch.proteins_measured, batch.proteins, 77.0))
    assert torch.equal(model.losses(batch, Step(), None).minimise, model.losses(odd, Step(), None).minimise)
    lacking = batch.batch == 2
    losses = model.losses(batch, Step(), None)
    assert not losses.terms["reconstruction_proteins"][lacking].any()
    assert losses.terms["reconstruction_proteins"][~lacking].all()
    none = replace(batch, proteins=None, proteins_measured=None)
    torch.testing.assert_close(model.losses(none, Step(), None).minimise[lacking], losses.minimise[lacking])


def test_the_background_is_started_from_cells_of_each_batch_on_any_number_of_workers() -> None:
    model, batch = made(n=400, without=2)
    steps = [_rows(batch, slice(i, i + 50)) for i in range(0, 400, 50)]
    read: list[int] = []

    def counted() -> object:
        for i, step in enumerate(steps):
            read.append(i)
            yield step

    model.observe(counted())  # type: ignore[arg-type]
    assert 3 <= len(read) < len(steps)  # 100 of each of three batches are found in fewer
    mean = model.background.mean.rows.detach()
    assert (mean[:2] > 1).all()
    assert (mean[:2] < 2.2).all()  # log(1 + 4), not that of the foreground
    assert not mean[2].any()
    assert model.adversary is not None
    assert float(model.adversary.on) == 1.0

    halves = [[_rows(step, slice(k, None, 2), n_global=50) for step in steps] for k in (0, 1)]
    sums: list[list[torch.Tensor]] = []
    for half in halves:  # what each of two workers adds
        found: list[torch.Tensor] = []
        worker, _ = made()
        wanted = torch.ones(3, dtype=torch.bool)
        found = [worker._sampled(step, wanted) for step in half]
        sums.append(found)
    whole = [model._sampled(step, torch.ones(3, dtype=torch.bool)) for step in steps]
    for a, b, c in zip(*sums, whole, strict=True):
        torch.testing.assert_close(a + b, c)


def _rows(batch: Batch, rows: slice, n_global: int | None = None) -> Batch:
    from tests.models.cells import DenseCounts

    x = batch.counts.dense(torch.device("cpu"))[rows]
    assert batch.proteins is not None
    assert batch.proteins_measured is not None
    return replace(
        batch,
        counts=DenseCounts(x),
        batch=batch.batch[rows],
        labels=batch.labels[rows],
        rows=batch.rows[rows],
        lanes=((0, len(x)),),
        n_global=n_global or len(x),
        proteins=batch.proteins[rows],
        proteins_measured=batch.proteins_measured[rows],
    )


def test_few_proteins_start_flat() -> None:
    model, batch = made(p=8)
    model.observe([batch])
    assert (model.background.mean.rows == 3).all()
    assert not model.background.log_sd.rows.any()


def test_the_adversary_is_on_where_cells_lack_proteins() -> None:
    for without, config, wanted in ((None, None, 0.0), (1, None, 1.0), (None, True, 1.0)):
        model, batch = made({"adversary": config}, without=without)
        model.observe([batch])
        assert model.adversary is not None
        assert float(model.adversary.on) == wanted
        model.train()
        fooled = model.losses(batch, Step(kl_weight=0.2), Noise.of_step(0, 0, batch)).terms["adversary_fooled"]
        assert bool(fooled.any()) == bool(wanted)
    assert made({"adversary": False})[0].adversary is None
    assert made(batches="a")[0].adversary is None
    model, batch = made({"adversary": True})
    assert "adversary_fooled" not in model.eval().losses(batch, Step(), None).terms


@pytest.mark.long
def test_it_trains() -> None:
    model, batch = made(without=2)
    model.observe([batch])
    optimiser = torch.optim.Adam(model.parameters(), 4e-3, eps=0.01)
    values = []
    for step in range(60):
        loss = model.train()(batch, Step(step, kl_weight=0.5), Noise.of_step(0, step, batch)).minimise.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.8 * values[0]


def test_surgery_moves_rows_of_new_batches_alone() -> None:
    model, _ = made(without=2)
    schema = replace(model.schema, batch=model.schema.batch.extended(["d"]))
    query = cells(schema, 40, 3, seed=1)
    query = replace(query, batch=torch.full_like(query.batch, 3))
    grown = grow(model, schema, seed=0)
    frozen = reference_hash(grown)
    grown.observe([query])
    optimiser = torch.optim.Adam([p for p in grown.parameters() if p.requires_grad], 1e-2)
    for step in range(3):
        optimiser.zero_grad()
        grown.train()(query, Step(step), Noise.of_step(0, step, query)).minimise.mean().backward()
        optimiser.step()
    assert reference_hash(grown) == frozen
    moved = set(trainable(grown))
    assert all(name.endswith(".new") for name in moved)
    assert delta(grown).keys() - moved == {"efficiency.new", "adversary.classes.new"}
    old = cells(model.schema, 20, None, seed=2)
    for a, b in zip(model.eval().embed(old), grown.eval().embed(old), strict=True):
        assert torch.equal(a, b)


def test_proteins_of_rna_alone_are_imputed() -> None:
    model, batch = made(without=2)
    model.eval()
    rna = replace(batch, proteins=None, proteins_measured=None)
    found = out.denoised_proteins(model, rna, None, transform_batch=["a", "b"])
    parts = [out.denoised_proteins(model, rna, None, transform_batch=one) for one in ("a", "b")]
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)
    probability = out.foreground_probability(model, rna, None, transform_batch=["a"])
    assert ((probability >= 0) & (probability <= 1)).all()
    noise = Noise.of_step(0, 0, batch)
    drawn = out.denoised_proteins(model, batch, noise, sample_protein_mixing=True, scale_protein=True)
    totals = drawn.sum(-1)
    assert ((totals - 1).abs().lt(1e-5) | totals.eq(0)).all()
    with pytest.raises(UsageError, match="n_samples"):
        out.denoised_proteins(model, batch, None, sample_protein_mixing=True)
    with pytest.raises(CategoryError, match="zz"):
        out.foreground_probability(model, batch, None, transform_batch="zz")
    with pytest.raises(UsageError, match="no batch"):
        out.foreground_probability(model, batch, None, transform_batch=[])


def test_what_was_found_of_the_reference_stays_when_all_weights_train() -> None:
    """An update with all weights on known batches: the prior that was learnt is not started anew."""
    model, batch = made({"use_observed_lib_size": False, "empirical_background": True})
    model.observe([batch])
    known = grow(model, model.schema, seed=0)
    known.query_mode = None
    assert not known.observes
    schema = replace(model.schema, batch=model.schema.batch.extended(["d"]))
    new = grow(model, schema, seed=0)
    new.query_mode = None
    assert new.observes
    before = new.background.mean.rows.clone()
    new.observe([replace(batch, batch=torch.full_like(batch.batch, 3))])
    assert torch.equal(new.background.mean.rows, before)
    assert new.background.mean.new is not None
    assert not torch.equal(new.background.mean.new, torch.full_like(new.background.mean.new, 3.0))


def test_reading_for_a_new_batch_ends_with_its_cells() -> None:
    model, batch = made({"empirical_background": True}, n=120)
    model.observe([batch])
    new = grow(model, replace(model.schema, batch=model.schema.batch.extended(["d"])), seed=0)
    read = []

    def batches() -> Iterator[Batch]:
        for number in range(20):
            read.append(number)
            yield replace(batch, batch=torch.full_like(batch.batch, 3))

    new.observe(batches())
    assert read == [0]


def test_a_drawn_library_size_is_bounded_in_every_output() -> None:
    model, batch = made({"use_observed_lib_size": False})
    model.observe([batch])
    assert model.library is not None
    with torch.no_grad():
        model.library.mean.bias.fill_(40.0)
    rate = outputs.likelihood_parameters(model.eval(), batch, None)["mean"]
    torch.testing.assert_close(rate.sum(-1).log(), torch.full((len(batch),), 15.0))
    assert torch.equal(rate, out.denoised_genes(model, batch, None, library_size="latent"))


def test_the_adversary_never_learns_to_be_wrong() -> None:
    model, batch = made({"adversary": True})
    model.observe([batch])
    model.train()
    found = [model.losses(batch, Step(kl_weight=w), Noise.of_step(0, 0, batch)) for w in (1.0, 1.5)]
    terms = found[1].terms
    plain = terms["reconstruction_genes"] + 1.5 * (
        terms["reconstruction_proteins"] + terms["kl"] + terms["kl_background"]
    )
    torch.testing.assert_close(found[1].minimise, plain)


def test_the_adversary_counts_while_the_kl_weight_is_below_one() -> None:
    """It is shown the latent that was drawn, and both of its terms are minimised."""
    model, batch = made({"adversary": True})
    model.observe([batch])
    model.train()
    adversary = model.adversary
    assert adversary is not None
    shown: list[torch.Tensor] = []
    adversary.trunk.register_forward_pre_hook(lambda _, given: shown.append(given[0].detach()))
    found = model.losses(batch, Step(kl_weight=0.3), Noise.of_step(0, 0, batch))
    terms = found.terms
    plain = terms["reconstruction_genes"] + 0.3 * (
        terms["reconstruction_proteins"] + terms["kl"] + terms["kl_background"]
    )
    both = terms["adversary_fooled"] + terms["adversary_error"]
    assert both.gt(0).all()
    torch.testing.assert_close(found.minimise, plain + 0.7 * both)
    noise = Noise.of_step(0, 0, batch)
    drawn, _ = model.draw_latent(model.encode(batch.counts.dense(model.device), batch, noise), noise)
    assert all(torch.equal(z_BL, drawn) for z_BL in shown)
    assert len(shown) == 2


def test_surgery_trains_without_the_adversary() -> None:
    model, batch = made({"adversary": True})
    model.observe([batch])
    schema = replace(model.schema, batch=model.schema.batch.extended(["d"]))
    grown = grow(model, schema, seed=0, config=SurgeryConfig(query_mode="train")).train()
    assert grown.training
    losses = grown.losses(batch, Step(kl_weight=0.3), Noise.of_step(0, 0, batch))
    assert not [name for name in losses.terms if "adversary" in name]


def test_outputs_of_genes_are_those_of_scvi() -> None:
    model, batch = made()
    model.eval()
    torch.testing.assert_close(
        outputs.normalised_expression(model, batch, None), out.denoised_genes(model, batch, None)
    )
    noise = Noise.of_step(0, 0, batch)
    assert torch.isfinite(out.marginal_log_likelihood(model, batch, noise, 5)).all()


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(UsageError, match="protein-key"):
        Totalvi(Totalvi.Config(), made_schema(5))
    schema = replace(made_schema(5), proteins=("p",))
    with pytest.raises(UsageError, match="label-key"):
        Totalvi(Totalvi.Config(protein_dispersion="protein-label"), schema)
    model, batch = made()
    assert batch.proteins is not None
    with pytest.raises(CategoryError, match="3 proteins"):
        model.losses(replace(batch, proteins=batch.proteins[:, :3]), Step(), None)
