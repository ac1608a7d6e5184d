from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scarcade.engine.contracts import Noise, Step
from scarcade.engine.errors import CategoryError, GenesError, ModelFileError
from scarcade.engine.schema import Categories, Schema
from scarcade.models import MODELS, RECIPES, AtlasModel, Scvi, Totalvi
from scarcade.models.saved import read, save
from scarcade.models.surgery import (
    SurgeryConfig,
    additions,
    apply_delta,
    delta,
    grow,
    reference_hash,
    settled,
    trainable,
)
from tests.models.cells import made_batch, made_schema


def reference(config: dict[str, Any] | None = None, **schema: Any) -> Scvi:
    """A trained-looking model: batch norm has seen data."""
    made = made_schema(25, **schema)
    model = Scvi(
        Scvi.Config(**{"n_hidden": 12, "n_latent": 4, **(RECIPES["scarches"] if config is None else config)}), made
    )
    batch = made_batch(made, 40)
    model.observe([batch])
    model.losses(batch, Step(), Noise.of_step(0, 0, batch))
    return model.eval()


def with_batches(schema: Schema, *new: str) -> Schema:
    return replace(schema, batch=schema.batch.extended(new))


def train(model: AtlasModel, steps: int = 5, seed: int = 1, first_batch: int = 2) -> None:
    """As the engine does: parameters that require a gradient, with weight decay to make it hard."""
    batch = made_batch(model.schema, 30, seed=seed, first_batch=first_batch)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=1e-2)
    model.train()
    for step in range(steps):
        optimiser.zero_grad()
        model(batch, Step(step), Noise.of_step(0, step, batch)).minimise.mean().backward()
        optimiser.step()
    model.eval()


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    "config",
    [
        None,
        {"encode_covariates": True},
        {"dispersion": "gene-batch", "encode_covariates": True},
        {"use_observed_lib_size": False, "encode_covariates": True, "gene_likelihood": "nb"},
    ],
)
def test_the_reference_stays_bit_for_bit(config: dict[str, Any] | None, mode: Any) -> None:
    model = reference(config)
    before = reference_hash(model)
    cells = made_batch(model.schema, 20)
    latent, loss = model.embed(cells), model.losses(cells, Step(), None).minimise
    grown = grow(model, with_batches(model.schema, "q"), seed=0, config=SurgeryConfig(query_mode=mode))
    assert reference_hash(grown) == before
    start = delta(grown)
    train(grown)
    assert reference_hash(grown) == before == reference_hash(model)
    assert any(not torch.equal(start[name], tensor) for name, tensor in delta(grown).items())
    assert all(torch.equal(a, b) for a, b in zip(latent, grown.embed(cells), strict=True))
    assert torch.equal(loss, grown.losses(cells, Step(), None).minimise)


def test_training_lowers_the_loss_of_the_query_and_moves_its_cells() -> None:
    grown = grow(reference(), with_batches(reference().schema, "q"), seed=0)
    cells = made_batch(grown.schema, 30, seed=1, first_batch=2)
    before, latent = grown.losses(cells, Step(), None).minimise.mean().item(), grown.embed(cells)[0]
    train(grown, 40)
    assert grown.losses(cells, Step(), None).minimise.mean().item() < before
    assert not torch.equal(grown.embed(cells)[0], latent)


def test_only_rows_of_new_conditions_are_trained() -> None:
    grown = grow(reference(), with_batches(reference().schema, "q", "r"), seed=0)
    assert set(trainable(grown)) == {
        f"{part}.linear.{i}.conditions.batch.new" for part in ("encoder.trunk", "decoder") for i in (0, 1)
    }
    assert all(len(p) == 2 for p in trainable(grown).values())
    assert sum(t.numel() * 4 for t in delta(grown).values()) < 2000


def test_queries_do_not_touch_each_other() -> None:
    """The gradient of a query's row is the same alone and among others."""
    model = reference()
    pair, alone = (
        grow(model, with_batches(model.schema, "q", "r"), seed=0),
        grow(model, with_batches(model.schema, "r"), seed=0),
    )
    cells = made_batch(pair.schema, 30, seed=1, first_batch=3)
    own = replace(cells, batch=cells.batch - 1)
    for grown, batch in ((pair, cells), (alone, own)):
        grown.losses(batch, Step(), None).minimise.mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in trainable(pair).items():
        other = trainable(alone)[name]
        assert torch.equal(parameter[1], other[0])
        assert parameter.grad is not None
        assert other.grad is not None
        assert torch.equal(parameter.grad[1], other.grad[0])
        assert not parameter.grad[0].any()


def test_a_new_covariate_value_goes_into_its_own_block() -> None:
    model = reference({"encode_covariates": True}, categorical=("xy", "uvw"))
    schema = model.schema
    grown_schema = replace(schema, categorical=(Categories("cat0", ("x", "y", "z")), schema.categorical[1]))
    assert additions(schema, grown_schema) == {"batch": (), "categorical_0": ("z",), "categorical_1": ()}
    grown = grow(model, grown_schema, seed=0)
    assert all(".categorical_0.new" in name for name in trainable(grown))
    cells = made_batch(schema, 20)
    assert torch.equal(grown.embed(cells)[0], model.embed(cells)[0])


def test_a_new_batch_starts_with_the_mean_dispersion_and_trains_it() -> None:
    model = reference({"dispersion": "gene-batch"})
    grown = grow(model, with_batches(model.schema, "q"), seed=0)
    assert torch.equal(grown.theta.new[0], model.theta.rows.detach().mean(0))  # type: ignore[union-attr, index, operator]
    assert "theta.new" in trainable(grown)


def test_a_reference_of_one_batch_can_be_grown() -> None:
    model = reference(batches="a")
    cells = made_batch(model.schema, 20)
    grown = grow(model, with_batches(model.schema, "q"), seed=0)
    assert torch.equal(grown.embed(cells)[0], model.embed(cells)[0])
    train(grown, first_batch=1)
    assert torch.equal(grown.embed(cells)[0], model.embed(cells)[0])


def test_delta_and_reference_make_the_model_again() -> None:
    for config in (None, {"use_observed_lib_size": False, "encode_covariates": True, "dispersion": "gene-batch"}):
        model = reference(config)
        schema = with_batches(model.schema, "q")
        grown = grow(model, schema, seed=3)
        grown.observe([made_batch(schema, 30, seed=1, first_batch=2)])
        train(grown)
        again = apply_delta(model, delta(grown), schema)
        state = again.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in grown.state_dict().items())
        assert not trainable(again)


def test_decoder_norm_can_be_trained_too() -> None:
    model = reference({"encode_covariates": True})
    schema = with_batches(model.schema, "q")
    grown = grow(model, schema, seed=0, config=SurgeryConfig(train_decoder_norm=True))
    assert {"decoder.norm.0.weight", "decoder.norm.0.bias"} < set(trainable(grown))
    train(grown)
    cells = made_batch(schema, 20, first_batch=2)
    assert torch.equal(
        apply_delta(model, delta(grown), schema).losses(cells, Step(), None).minimise,
        grown.losses(cells, Step(), None).minimise,
    )


def test_a_delta_of_another_model_is_refused() -> None:
    model = reference()
    schema = with_batches(model.schema, "q")
    good = delta(grow(model, schema, seed=0))
    name = next(iter(good))
    for bad in ({}, {**good, "scale.weight": torch.zeros(25, 12)}, {**good, name: torch.zeros(2, 12)}):
        with pytest.raises(ModelFileError, match="does not fit"):
            apply_delta(model, bad, schema)


def test_query_mode_eval_keeps_the_model_in_evaluation_mode() -> None:
    for mode, training in (("eval", False), ("train", True)):
        grown = grow(reference(), with_batches(reference().schema, "q"), seed=0, config=SurgeryConfig(query_mode=mode))
        assert grown.train().training is training
    assert settled(grown).train().training
    assert all(p.requires_grad for p in settled(grown).parameters())


def test_growing_twice_makes_the_first_query_part_of_the_reference() -> None:
    model = reference()
    once = grow(model, with_batches(model.schema, "q"), seed=0)
    train(once)
    twice = grow(once, with_batches(once.schema, "r"), seed=0)
    cells = made_batch(once.schema, 20)
    assert torch.equal(twice.embed(cells)[0], once.embed(cells)[0])
    assert all(len(p) == 1 for p in trainable(twice).values())


@pytest.mark.parametrize("name", ["scvi", "trvae"])
def test_a_second_surgery_starts_from_the_same_rows_in_memory_and_from_disk(name: str, tmp_path: Path) -> None:
    kind = MODELS[name]
    schema = made_schema(25, batches="a", categorical=("xy",))
    small: dict[str, Any] = {"scvi": {"n_hidden": 12, "encode_covariates": True}, "trvae": {"hidden_layer_sizes": (8,)}}
    model: AtlasModel = kind(kind.Config.model_validate(small[name]), schema)
    once = grow(model, with_batches(schema, "q", "r"), seed=0)
    save(once, tmp_path / "once", training={}, data_fingerprint=None)
    again = with_batches(once.schema, "s")
    in_memory, from_disk = grow(once, again, seed=1), grow(read(tmp_path / "once"), again, seed=1)
    added = delta(from_disk)
    assert delta(in_memory).keys() == added.keys()
    assert all(torch.equal(tensor, added[key]) for key, tensor in delta(in_memory).items())
    assert list(in_memory.state_dict()) == list(from_disk.state_dict())  # sums over tables are in the same order


def test_labels_and_proteins_are_those_of_the_reference() -> None:
    schema = replace(made_schema(25, labels="uv"), proteins=("p0", "p1"))
    model = Totalvi(Totalvi.Config(n_hidden=12, n_latent=4), schema).eval()
    bare = replace(with_batches(schema, "q"), labels=(), proteins=())
    grown = grow(model, bare, seed=0)
    assert (grown.schema.labels, grown.schema.proteins) == (schema.labels, schema.proteins)
    assert grown.embed(made_batch(bare, 10))[0].shape == (10, 4)
    with pytest.raises(GenesError, match="proteins"):
        grow(model, replace(bare, proteins=("p1", "p0")), seed=0)


def test_what_does_not_fit_is_refused() -> None:
    schema = made_schema(5, labels="uv", categorical=("xy",), continuous=1)
    for other, error, said in (
        (replace(schema, genes=schema.genes[::-1]), GenesError, "align"),
        (replace(schema, batch=Categories("batch", ("b", "a", "c"))), CategoryError, "begin with"),
        (replace(schema, labels=(Categories("label", ("u", "v", "w")),)), CategoryError, "fixed by the reference"),
        (replace(schema, continuous=()), CategoryError, "continuous"),
        (replace(schema, categorical=()), CategoryError, "categorical"),
    ):
        with pytest.raises(error, match=said):
            additions(schema, other)


@pytest.mark.parametrize(
    "config", [SurgeryConfig(query_mode="train"), SurgeryConfig(train_decoder_norm=True), SurgeryConfig()]
)
def test_only_what_stays_as_it_is_is_shared_with_the_reference(config: SurgeryConfig) -> None:
    schema = made_schema()
    reference = Scvi(Scvi.Config(n_hidden=8, encode_covariates=True), schema)
    grown = grow(reference, replace(schema, batch=schema.batch.extended(["new"])), seed=0, config=config, share=True)
    ours = dict(reference.state_dict())
    shared = [name for name, tensor in grown.state_dict().items() if name in ours and tensor is not None]
    same = {ours[name].data_ptr() == grown.state_dict()[name].data_ptr() for name in shared if ours[name].numel()}
    assert same == {config == SurgeryConfig()}
    assert not any(p.requires_grad for name, p in grown.named_parameters() if not name.endswith("new")) or (
        config.train_decoder_norm
    )
