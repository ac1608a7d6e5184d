"""TOTALVI against small models of scvi-tools 1.4.2 that stand beside this file (made by make_totalvi_fixtures.py)."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Step
from scarcade.engine.schema import Schema
from scarcade.models import protein_outputs as out
from scarcade.models.interop.totalvi import build, from_state, to_state
from scarcade.models.surgery import SurgeryConfig, grow
from scarcade.models.totalvi import Totalvi
from tests.models.cells import batch_of
from tests.parity.originals import Arrays, five_batches, gradients, made_beside, near, part

CASES = ["covariates", "decoder_only", "default", "latent_library", "logistic_normal", "missing"]
QUERIES = ["default", "missing"]
PATHS = ["eager", "auto"]


@dataclass
class Case:
    arrays: Arrays
    meta: dict[str, Any]
    model: Totalvi
    reference: Batch


def cells(schema: Schema, arrays: Arrays, obs: dict[str, list[str]], *, missing: bool) -> Batch:
    codes = schema.batch.codes()
    made = batch_of(
        arrays["x"],
        np.array([codes[b] for b in obs["batch"]]),
        labels=np.array([schema.labels[0].codes()[v] for v in obs["label"]]) if schema.labels else None,
        categorical=np.array([[schema.categorical[0].codes()[v]] for v in obs["cat"]]) if schema.categorical else None,
        continuous=arrays["cont"][:, None] if schema.continuous else None,
        size_factor=arrays["size"] if schema.size_factor else None,
    )
    lacking = np.isin(obs["batch"], ["b2", "b4"]) & missing
    measured = torch.as_tensor(np.broadcast_to(~lacking[:, None], arrays["y"].shape).copy())
    return replace(made, proteins=torch.as_tensor(arrays["y"].copy()), proteins_measured=measured)


def case_of(name: str, path: str = "eager") -> Case:
    arrays, meta = made_beside(f"totalvi_{name}")
    model = build(part(arrays, "state"), meta["genes"], meta["attributes"], where=name)
    model.config = model.config.model_copy(update={"likelihood_path": path})
    return Case(arrays, meta, model.eval(), cells(model.schema, arrays, meta["obs"], missing=meta["missing"]))


def query_of(case: Case, **config: bool) -> tuple[Totalvi, Batch, Arrays]:
    grown = five_batches(case.model.schema)
    arrays = part(case.arrays, "query")
    batch = cells(grown, arrays, case.meta["query_obs"], missing=case.meta["missing"])
    return grow(case.model, grown, seed=0, config=SurgeryConfig(**config)), batch, arrays


def same(model: Totalvi, batch: Batch, wanted: Arrays) -> None:
    with torch.no_grad():
        q = model.encode(batch.counts.dense(torch.device("cpu")), batch)
        p = model.decode(model.shape_latent(q.mean_BL), q.log_library_B1, batch)
        losses = model.losses(batch, Step(), None)
        half = model.losses(batch, Step(kl_weight=0.5), None)
    near(q.mean_BL, wanted["qz_m"])
    near(q.variance_BL.sqrt(), wanted["qz_scale"])
    near(p.rate_BG, wanted["px_rate"])
    near(p.proteins.rate_back_BP, wanted["rate_back"])
    near(p.proteins.rate_fore_BP, wanted["rate_fore"])
    near(p.proteins.mixing_BP, wanted["mixing"])
    near(losses.terms["reconstruction_genes"], wanted["genes"])
    near(losses.terms["reconstruction_proteins"], wanted["proteins"])
    near(losses.terms["kl"], wanted["kl_z"])
    near(losses.terms.get("kl_library", torch.zeros(len(batch))), wanted["kl_l"])
    near(losses.terms["kl_background"], wanted["kl_background"])
    near(losses.minimise.mean(), wanted["loss"])
    near(half.minimise.mean(), wanted["loss_half"])
    where: dict[str, Any] = {"transform_batch": ["b0", "b1"]}
    near(out.denoised_genes(model, batch, None, **where), wanted["denoised_genes"])
    near(out.denoised_proteins(model, batch, None, **where), wanted["denoised_proteins"])
    with_background = out.denoised_proteins(model, batch, None, include_protein_background=True, **where)
    near(with_background, wanted["with_background"])
    near(out.foreground_probability(model, batch, None, **where), wanted["foreground"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_outputs(name: str, path: str) -> None:
    case = case_of(name, path)
    same(case.model, case.reference, part(case.arrays, "expected"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, path: str) -> None:
    case = case_of(name, path)
    found, wanted = to_state(case.model, gradients(case.model, case.reference)), part(case.arrays, "gradient")
    assert wanted
    for key, value in wanted.items():
        if key in found:
            near(found[key], value)
        else:  # parts that this configuration does not use, which we do not build
            assert key.startswith(("decoder.px_dropout_decoder_gene", "encoder.l_gene"))


@pytest.mark.parametrize("name", CASES)
def test_weights_go_there_and_back(name: str) -> None:
    case = case_of(name)
    theirs = part(case.arrays, "state")
    for key, value in to_state(case.model).items():
        np.testing.assert_array_equal(value, theirs[key])


@pytest.mark.parametrize("name", QUERIES)
def test_query_outputs(name: str) -> None:
    case = case_of(name)
    model, batch, arrays = query_of(case)
    model.load_state_dict(from_state(model, part(arrays, "state")))
    same(model, batch, part(arrays, "expected"))


@pytest.mark.parametrize("name", QUERIES)
def test_query_gradients(name: str) -> None:
    """What upstream trains has the gradients it has there: one-hot columns, priors, the decoder's batch norm."""
    case = case_of(name)
    model, batch, arrays = query_of(case, train_decoder_norm=True)
    model.load_state_dict(from_state(model, part(arrays, "state")))
    for parameter_name, parameter in model.named_parameters():
        if ".conditions." in parameter_name or parameter_name.startswith("background."):
            parameter.requires_grad_(True)
    found, wanted = to_state(model, gradients(model, batch)), part(arrays, "gradient")
    assert any(value.any() for value in wanted.values())
    for key, value in wanted.items():
        if key in found:
            near(found[key], value)
        else:
            assert key.startswith(("decoder.px_dropout_decoder_gene", "encoder.l_gene"))
