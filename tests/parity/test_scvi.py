"""SCVI against small models of scvi-tools 1.4.2 that stand beside this file (made by make_fixtures.py)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Step
from scarcade.engine.schema import Categories, Schema
from scarcade.jobs.differential import DifferentialConfig, Draws, Groups, compare, fdr_calls, raw_statistics
from scarcade.models.interop.scvi_tools import build, from_state, to_state
from scarcade.models.outputs import normalised_expression
from scarcade.models.scvi import Scvi
from scarcade.models.surgery import SurgeryConfig, grow
from tests.models.cells import batch_of
from tests.parity.originals import HERE, Arrays, five_batches, gradients, made_beside, near, part

CASES = sorted(p.stem.removeprefix("scvi_") for p in HERE.glob("scvi_*.npz") if "differential" not in p.name)
QUERIES = ["arches", "default", "latent_library", "shallow"]
PATHS = ["eager", "analytic", "auto"]


@dataclass
class Case:
    arrays: Arrays
    meta: dict[str, Any]
    model: Scvi
    reference: Batch


def cells(schema: Schema, arrays: Arrays, obs: dict[str, list[str]], batches: Categories) -> Batch:
    codes = batches.codes()
    return batch_of(
        arrays["x"],
        np.array([codes.get(b, 0) for b in obs["batch"]]),
        labels=np.array([schema.labels[0].codes()[v] for v in obs["label"]]) if schema.labels else None,
        categorical=np.array([[schema.categorical[0].codes()[v]] for v in obs["cat"]]) if schema.categorical else None,
        continuous=arrays["cont"][:, None] if schema.continuous else None,
        size_factor=arrays["size"] if schema.size_factor else None,
    )


def case_of(name: str, path: str = "eager") -> Case:
    arrays, meta = made_beside(f"scvi_{name}")
    model = build(part(arrays, "state"), meta["genes"], meta["attributes"], where=name)
    model.config = model.config.model_copy(update={"likelihood_path": path})
    return Case(arrays, meta, model.eval(), cells(model.schema, arrays, meta["obs"], model.schema.batch))


def query_of(case: Case, **config: bool) -> tuple[Scvi, Batch, Arrays]:
    grown = five_batches(case.model.schema)
    model = grow(case.model, grown, seed=0, config=SurgeryConfig(**config))
    arrays = part(case.arrays, "query")
    batch = cells(case.model.schema, arrays, case.meta["query_obs"], grown.batch)
    model.observe([batch])
    return model, batch, arrays


def same(model: Scvi, batch: Batch, wanted: Arrays) -> None:
    with torch.no_grad():
        q = model.encode(batch.counts.dense(torch.device("cpu")), batch)
        p = model.decode(model.shape_latent(q.mean_BL), q.log_library_B1, batch)
        losses = model.losses(batch, Step(), None)
    near(q.mean_BL, wanted["qz_m"])
    near(q.variance_BL.sqrt(), wanted["qz_scale"])
    if model.schema.size_factor is None:
        near(q.log_library_B1, wanted["library"])
    near(p.rate_BG, wanted["rate"])
    if p.dropout_BG is not None:
        near(p.dropout_BG, wanted["dropout"])
    near(losses.terms["reconstruction"], wanted["reconstruction"])
    near(losses.terms["kl"], wanted["kl_z"])
    near(losses.terms.get("kl_library", torch.zeros(len(batch))), wanted["kl_l"])
    near(losses.minimise.mean(), wanted["loss"])
    last = len(model.schema.batch) - 1
    near(normalised_expression(model, batch, None, transform_batch=(last,)), wanted["normalised"])


def test_there_are_cases() -> None:
    assert len(CASES) == 12
    assert sum(p.stat().st_size for p in HERE.glob("scvi_*.npz")) < 300_000


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_outputs(name: str, path: str) -> None:
    case = case_of(name, path)
    same(case.model, case.reference, part(case.arrays, "expected"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, path: str) -> None:
    case = case_of(name, path)
    found = to_state(case.model, gradients(case.model, case.reference))
    wanted = part(case.arrays, "gradient")
    for key, value in wanted.items():
        if key in found:
            near(found[key], value)
        else:  # a head that this likelihood does not use, which we do not build
            assert (
                key.startswith(("decoder.px_dropout_decoder", "decoder.px_r_decoder", "l_encoder")) or not value.any()
            )
    assert {key for key in found if not key.startswith("library_log") and "running" not in key} <= wanted.keys()


@pytest.mark.parametrize("name", CASES)
def test_weights_go_there_and_back(name: str) -> None:
    case = case_of(name)
    found, theirs = to_state(case.model), part(case.arrays, "state")
    for key, value in found.items():
        np.testing.assert_array_equal(value, theirs[key])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", QUERIES)
def test_query_outputs(name: str, path: str) -> None:
    case = case_of(name, path)
    model, batch, arrays = query_of(case)
    model.load_state_dict(from_state(model, part(arrays, "state")))
    same(model, batch, part(arrays, "expected"))


@pytest.mark.parametrize("name", QUERIES)
def test_query_gradients(name: str) -> None:
    """What upstream trains (one-hot columns, decoder batch norm, library encoder) has the gradients it has there."""
    case = case_of(name)
    model, batch, arrays = query_of(case, train_decoder_norm=True)
    model.load_state_dict(from_state(model, part(arrays, "state")))
    for parameter_name, parameter in model.named_parameters():
        if ".conditions." in parameter_name or parameter_name.startswith("library."):
            parameter.requires_grad_(True)
    found = to_state(model, gradients(model, batch))
    wanted = part(arrays, "gradient")
    assert any(value.any() for value in wanted.values())
    for key, value in wanted.items():
        if key in found:
            near(found[key], value)
        else:
            assert key.startswith("l_encoder")


def test_library_of_a_new_batch() -> None:
    """`observe` finds the library sizes that scvi-tools computes, of reference and query batches."""
    case = case_of("latent_library")
    theirs = {key: value for key, value in part(case.arrays, "query/state").items() if key.startswith("library_log")}
    model, _, _ = query_of(case)
    for key, value in theirs.items():
        near(to_state(model)[key], value)


def near_columns(found: Any, arrays: Arrays, name: str, columns: list[str]) -> None:
    for column in columns:
        near(found[column].to_numpy(), arrays[f"{name}/{column}"])


SETTINGS = {
    "vanilla": DifferentialConfig(mode="vanilla"),
    "change": DifferentialConfig(mode="change", delta=0.25),
    "two": DifferentialConfig(mode="change", delta=0.5, test_mode="two"),
    "corrected": DifferentialConfig(mode="change", delta=0.25, batch_correction=True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_differential_expression(name: str) -> None:
    """The same draws of frequencies give the same table."""
    arrays, meta = made_beside("scvi_differential")
    config = SETTINGS[name]
    in1 = arrays["in1"].astype(bool)
    pair = Groups(np.flatnonzero(in1), np.flatnonzero(~in1))
    (raw,) = raw_statistics([batch_of(arrays["x"], np.zeros(len(in1)))], arrays["x"].shape[1], [pair])
    values = ["b0", "b1"] if config.batch_correction else [None]
    sets = [
        Draws(
            np.concatenate([arrays[f"draws/{side}/{value}"] for value in values]),
            np.repeat(np.array(values, dtype=object), 40),
        )
        for side in range(2)
    ]
    found = compare(sets[0], sets[1], raw, config, np.random.default_rng(0))
    assert list(found) == meta["columns"][name]
    near_columns(found, arrays, name, meta["columns"][name])
    if config.mode == "change":
        proba, theirs = found["proba_de"].to_numpy(), arrays[f"{name}/calls"].astype(bool)
        # genes of equal probability may change places
        np.testing.assert_allclose(np.sort(proba[fdr_calls(proba, 0.3)]), np.sort(proba[theirs]))
