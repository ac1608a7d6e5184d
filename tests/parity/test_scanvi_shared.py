"""SCANVI against scvi-tools 1.4.2 on a model that it trained: latents, classifier, losses, gradients, query."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from scarcade.engine.contracts import Batch, Step
from scarcade.models.interop.scvi_tools import from_state, read_scvi_tools, to_state
from scarcade.models.scanvi import Scanvi
from scarcade.models.surgery import SurgeryConfig, grow
from tests.models.cells import batch_of
from tests.parity.originals import Arrays, SharedCase, five_batches, gradients, inputs, near
from tests.shared import shared

PATHS = ["eager", "analytic", "auto"]
SHOWN = 12  # cells in the arrays that are long


Case = SharedCase[Scanvi]


def case_of(path: str = "eager") -> Case:
    folder = shared("parity/SCANVI")
    cells = inputs()
    model = read_scvi_tools(folder / "ref_model")
    assert isinstance(model, Scanvi)
    model.config = model.config.model_copy(update={"likelihood_path": path})
    codes = model.schema.labels[0].codes()
    assert "Unknown" not in codes

    def batch(batches: list[str]) -> Batch:
        chosen = np.isin(cells["batch"], batches)
        labels = np.array([codes.get(value, -1) for value in cells["label"][chosen]])
        return batch_of(cells["X"][chosen], np.array([int(b[1:]) for b in cells["batch"][chosen]]), labels=labels)

    return Case(folder, model, batch(["b0", "b1", "b2"]), batch(["b3", "b4"]))


def grown_of(case: Case, state: str, **config: object) -> Scanvi:
    model = grow(case.model, five_batches(case.model.schema), seed=0, config=SurgeryConfig(**config))
    whole = to_state(model) | case.arrays("query_init_state")
    if state == "trained":
        whole |= case.arrays("query_trained_state")
    model.load_state_dict(from_state(model, whole))
    return model


def same_outputs(model: Scanvi, batch: Batch, wanted: Arrays) -> None:
    model.eval()
    with torch.no_grad():
        q = model.encode(batch.counts.dense(torch.device("cpu")), batch)
        losses = model.losses(batch, Step(), None)
    near(q.mean_BL, wanted["qz_m"])
    near(q.variance_BL.sqrt(), wanted["qz_scale"])
    near(losses.terms["reconstruction"] + losses.terms["z1"], wanted["recon_reconstruction_loss"])
    near(losses.terms["kl"], wanted["kl_kl_local"])
    near(losses.minimise.mean(), wanted["loss"])
    near(losses.minimise, losses.terms["elbo"].numpy())
    if "library" not in wanted:
        return
    with torch.no_grad():
        p = model.decode(q.mean_BL, q.log_library_B1, batch)
        logits_BC = model.classify(batch)
        z1_NL = q.mean_BL[:SHOWN].repeat(model.schema.n_labels, 1)
        codes = {"label": torch.arange(model.schema.n_labels).repeat_interleave(SHOWN)}
        z2_mean_NL, z2_variance_NL = model.z2_encoder(z1_NL, codes, None)
        z1_mean_NL, z1_variance_NL = model.z1_decoder(z2_mean_NL, codes)
    near(q.log_library_B1, wanted["library"])
    near(p.scale_BG[:SHOWN], wanted["px_scale"])
    near(p.rate_BG[:SHOWN], wanted["px_rate"])
    assert p.log_theta is not None
    assert p.dropout_BG is not None
    near(p.log_theta.exp(), wanted["px_r"])
    near(p.dropout_BG[:SHOWN], wanted["px_zi_logits"])
    assert wanted["classifier_out_is_logits"]
    near(logits_BC, wanted["classifier_out"])
    near(z2_mean_NL, wanted["qz2_m"].reshape(z2_mean_NL.shape))
    near(z2_variance_NL.sqrt(), wanted["qz2_scale"].reshape(z2_mean_NL.shape))
    near(z1_mean_NL, wanted["pz1_m"].reshape(z2_mean_NL.shape))
    near(z1_variance_NL, wanted["pz1_v"].reshape(z2_mean_NL.shape))
    near(model.label_prior, wanted["y_prior"].ravel())
    known = batch.labels >= 0
    theirs = wanted["label_code"].ravel()
    np.testing.assert_array_equal(batch.labels[known], theirs[known.numpy()])
    near(F.cross_entropy(logits_BC[known], batch.labels[known]), wanted["classification_loss_labelled_cells"])


@pytest.mark.parametrize("path", PATHS)
def test_reference_outputs(path: str) -> None:
    case = case_of(path)
    same_outputs(case.model, case.reference, case.arrays("expected_ref"))


@pytest.mark.parametrize("path", PATHS)
def test_reference_gradients(path: str) -> None:
    case = case_of(path)
    found = to_state(case.model, gradients(case.model, case.reference))
    wanted = case.arrays("grads_ref_eval_nonoise")
    assert any(key.startswith("classifier") for key in wanted)
    for key, value in wanted.items():
        if not key.startswith(("l_encoder", "decoder.px_r_decoder")):
            near(found[key], value)


@pytest.mark.parametrize("state", ["init", "trained"])
def test_query_outputs(state: str) -> None:
    case = case_of()
    same_outputs(grown_of(case, state), case.query, case.arrays(f"expected_query_{state}"))


def test_query_gradients() -> None:
    """With what upstream trains. (This model has no batch norm; of its leak see test_scanvi.py.)"""
    case = case_of()
    model = grown_of(case, "init", train_decoder_norm=True)
    for name, parameter in model.named_parameters():
        if ".conditions.batch" in name:
            parameter.requires_grad_(True)
    found = to_state(model, gradients(model, case.query))
    for key, value in case.arrays("grads_query_init_eval_nonoise").items():
        if not key.startswith("l_encoder"):
            near(found[key], value)
