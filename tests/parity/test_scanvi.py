"""SCANVI against small models of scvi-tools 1.4.2 that stand beside this file (made by make_scanvi_fixtures.py)."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Step
from scarcade.engine.schema import Schema
from scarcade.models.interop.scvi_tools import build, from_state, to_state
from scarcade.models.scanvi import Scanvi
from scarcade.models.surgery import SurgeryConfig, grow
from tests.models.cells import batch_of
from tests.parity.originals import HERE, Arrays, five_batches, gradients, loss_of, made_beside, near, part

CASES = sorted(p.stem.removeprefix("scanvi_") for p in HERE.glob("scanvi_*.npz"))
QUERIES = ["arches", "default"]


@dataclass
class Case:
    arrays: Arrays
    meta: dict[str, Any]
    model: Scanvi

    def cells(self, schema: Schema, arrays: Arrays, obs: dict[str, list[str]]) -> Batch:
        """All cells, with those that have labels beside them."""
        batches, labels = schema.batch.codes(), schema.labels[0].codes()
        whole = batch_of(
            arrays["x"],
            np.array([batches[b] for b in obs["batch"]]),
            labels=np.array([labels.get(v, -1) for v in obs["label"]]),
            categorical=np.array([[schema.categorical[0].codes()[v]] for v in obs["cat"]])
            if schema.categorical
            else None,
        )
        return replace(whole, labelled=subset(whole, np.flatnonzero(whole.labels.numpy() >= 0)))


def subset(batch: Batch, rows: np.ndarray) -> Batch:
    return batch_of(
        batch.counts.dense(torch.device("cpu"))[rows],
        batch.batch[rows],
        labels=batch.labels[rows].numpy(),
        categorical=None if batch.categorical is None else batch.categorical[rows].numpy(),
    )


def case_of(name: str) -> Case:
    arrays, meta = made_beside(f"scanvi_{name}")
    model = build(part(arrays, "state"), meta["genes"], meta["attributes"], where=name)
    assert isinstance(model, Scanvi)
    assert set(model.schema.labels[0].values) == {"t0", "t1", "t2"}
    return Case(arrays, meta, model.eval())


def query_of(case: Case, **config: bool) -> tuple[Scanvi, Batch, Arrays]:
    grown = five_batches(case.model.schema)
    model = grow(case.model, grown, seed=0, config=SurgeryConfig(**config))
    arrays = part(case.arrays, "query")
    model.load_state_dict(from_state(model, part(arrays, "state")))
    return model, case.cells(grown, arrays, case.meta["query_obs"]), arrays


def same(model: Scanvi, batch: Batch, wanted: Arrays) -> None:
    assert batch.labelled is not None
    with torch.no_grad():
        q = model.encode(batch.counts.dense(torch.device("cpu")), batch)
        losses = model.losses(batch, Step(), None)
        near(loss_of(model, batch), wanted["loss"])
        near(model.classify(batch.labelled), wanted["logits"])
    near(q.mean_BL, wanted["qz_m"])
    near(q.variance_BL.sqrt(), wanted["qz_scale"])
    near(losses.terms["reconstruction"] + losses.terms["z1"], wanted["reconstruction"])
    near(losses.terms["kl"] + losses.terms.get("kl_library", 0.0), wanted["kl"])
    near(losses.labelled_terms["classification"].mean(), wanted["classification"])
    near(model.predict_labels(batch), wanted["soft"])


def unused(key: str) -> bool:
    return key.startswith(("l_encoder", "decoder.px_r_decoder", "decoder.px_dropout_decoder"))


def test_there_are_cases() -> None:
    assert CASES == ["arches", "covariates", "default", "latent_library", "linear"]


@pytest.mark.parametrize("name", CASES)
def test_outputs(name: str) -> None:
    case = case_of(name)
    same(case.model, case.cells(case.model.schema, case.arrays, case.meta["obs"]), part(case.arrays, "expected"))


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    case = case_of(name)
    found = to_state(case.model, gradients(case.model, case.cells(case.model.schema, case.arrays, case.meta["obs"])))
    for key, value in part(case.arrays, "gradient").items():
        if key in found:
            near(found[key], value)
        else:
            assert unused(key)


@pytest.mark.parametrize("name", CASES)
def test_weights_go_there_and_back(name: str) -> None:
    case = case_of(name)
    theirs = part(case.arrays, "state")
    found = to_state(case.model)
    assert {key for key in theirs if not unused(key)} <= found.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value, theirs[key])


@pytest.mark.parametrize("name", QUERIES)
def test_query_outputs(name: str) -> None:
    case = case_of(name)
    model, batch, arrays = query_of(case)
    same(model, batch, part(arrays, "expected"))


@pytest.mark.parametrize("name", QUERIES)
def test_query_gradients(name: str) -> None:
    """Labelled cells of a query move its rows; the classifier's batch norm, which upstream trains, stays."""
    case = case_of(name)
    model, batch, arrays = query_of(case, train_decoder_norm=True)
    for parameter_name, parameter in model.named_parameters():
        if ".conditions.batch" in parameter_name:
            parameter.requires_grad_(True)
    found = to_state(model, gradients(model, batch))
    wanted = {k: v for k, v in part(arrays, "gradient").items() if not unused(k)}
    assert any(value.any() for value in wanted.values())
    for key, value in wanted.items():
        if key.startswith("classifier"):
            assert not found[key].any()
        else:
            near(found[key], value)
