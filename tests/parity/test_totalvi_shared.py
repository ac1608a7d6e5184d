"""TOTALVI against numbers of scvi-tools 1.4.2 on a model that it trained: outputs, losses, gradients, surgery."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Step
from scarcade.models.interop.scvi_files import read_files
from scarcade.models.interop.totalvi import build, from_state, to_state
from scarcade.models.surgery import SurgeryConfig, grow
from scarcade.models.totalvi import Totalvi
from tests.models.cells import batch_of
from tests.parity.originals import Arrays, SharedCase, five_batches, gradients, inputs, near
from tests.shared import shared

PATHS = ["eager", "auto"]


Case = SharedCase[Totalvi]


def case_of(path: str = "eager") -> Case:
    folder = shared("parity/TOTALVI")
    cells = inputs()
    model = build(*read_files(folder / "ref_model"), where="TOTALVI")
    model.config = model.config.model_copy(update={"likelihood_path": path})

    def batch(batches: list[str]) -> Batch:
        chosen = np.isin(cells["batch"], batches)
        y = torch.as_tensor(cells["protein"][chosen].astype(np.float32))
        codes = np.array([int(b[1:]) for b in cells["batch"][chosen]])
        made = batch_of(cells["X"][chosen], codes)
        return replace(made, proteins=y, proteins_measured=torch.ones_like(y, dtype=torch.bool))

    return Case(folder, model, batch(["b0", "b1", "b2"]), batch(["b3", "b4"]))


def grown_of(case: Case, **config: bool) -> Totalvi:
    return grow(case.model, five_batches(case.model.schema), seed=0, config=SurgeryConfig(**config))


def load(model: Totalvi, case: Case, state: str) -> None:
    whole = to_state(model) | case.arrays("query_init_state")
    if state == "trained":
        whole |= case.arrays("query_trained_state")
    model.load_state_dict(from_state(model, whole))


def same_outputs(model: Totalvi, batch: Batch, wanted: Arrays) -> None:
    model.eval()
    with torch.no_grad():
        q = model.encode(batch.counts.dense(torch.device("cpu")), batch)
        near(q.mean_BL, wanted["qz_m"])
        near(q.variance_BL.sqrt(), wanted["qz_scale"])
        losses = model.losses(batch, Step(), None)
        near(losses.terms["reconstruction_genes"], wanted["recon_reconst_loss_gene"])
        near(losses.terms["reconstruction_proteins"], wanted["recon_reconst_loss_protein"])
        near(losses.terms["kl"], wanted["kl_kl_div_z"])
        near(losses.terms["kl_background"], wanted["kl_kl_div_back_pro"])
        near(losses.minimise.mean(), wanted["loss"])
        if "library_gene" not in wanted:
            return
        p = model.decode(q.mean_BL, q.log_library_B1, batch)
        y = p.proteins
        near(p.log_library_B1.exp(), wanted["library_gene"])
        near(p.scale_BG[:12], wanted["px_scale"])
        near(p.rate_BG[:12], wanted["px_rate"])
        assert p.log_theta is not None
        near(p.log_theta.exp(), wanted["px_r"])
        near(y.log_theta.exp(), wanted["py_r"])
        near(y.back_mean_BP[:12], wanted["py_back_alpha"])
        near(y.back_sd_BP[:12], wanted["py_back_beta"])
        near(y.rate_back_BP[:12], wanted["py_rate_back"])
        near(y.fore_scale_BP[:12], wanted["py_fore_scale"])
        near(y.rate_fore_BP[:12], wanted["py_rate_fore"])
        near(y.mixing_BP[:12], wanted["py_mixing"])


@pytest.mark.parametrize("path", PATHS)
def test_reference_outputs(path: str) -> None:
    case = case_of(path)
    same_outputs(case.model, case.reference, case.arrays("expected_ref"))


@pytest.mark.parametrize("path", PATHS)
def test_reference_gradients(path: str) -> None:
    case = case_of(path)
    found = to_state(case.model, gradients(case.model, case.reference))
    wanted = case.arrays("grads_ref_eval_nonoise")
    assert wanted
    for key, value in wanted.items():
        near(found[key], value)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", ["init", "trained"])
def test_query_outputs(state: str, path: str) -> None:
    case = case_of(path)
    model = grown_of(case)
    load(model, case, state)
    same_outputs(model, case.query, case.arrays(f"expected_query_{state}"))


def test_surgery_keeps_the_reference_and_appends() -> None:
    case = case_of()
    ours, before = to_state(grown_of(case)), to_state(case.model)
    theirs = case.arrays("query_init_state")
    for key, value in ours.items():
        if key in theirs:
            assert value.shape == theirs[key].shape
            reference = before[key]
            np.testing.assert_array_equal(value[:, : reference.shape[1]], reference)
        else:
            np.testing.assert_array_equal(value, before[key])


def test_query_gradients() -> None:
    """New rows have the gradients that they have there, and nothing else moves."""
    case = case_of()
    model = grown_of(case)
    load(model, case, "init")
    found = to_state(model, gradients(model, case.query))
    for key, value in case.arrays("grads_query_init_eval_nonoise").items():
        if key.endswith(".bias"):
            assert not found[key].any()
            continue
        np.testing.assert_array_equal(found[key][:, :-2], 0.0)
        near(found[key][:, -2:], value[:, -2:])
        assert key not in case.arrays("query_trained_state") or not value[:, :-2].any()
    assert not found["log_per_batch_efficiency"].any()
