"""SCVI against numbers of scvi-tools 1.4.2 on models that it trained: latent, decoder, losses, gradients, surgery."""

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Step
from scarcade.models.interop.scvi_tools import from_state, read_scvi_tools, to_state
from scarcade.models.scvi import Scvi
from scarcade.models.surgery import SurgeryConfig, delta, grow, trainable
from tests.models.cells import batch_of
from tests.parity.originals import Arrays, SharedCase, five_batches, gradients, inputs, near
from tests.shared import shared

CASES = ["SCVI_default", "SCVI_arches_nb", "SCVI_covs_genebatch"]
PATHS = ["eager", "analytic", "auto"]

Case = SharedCase[Scvi]


def case_of(name: str, path: str = "eager") -> Case:
    folder = shared(f"parity/{name}")
    cells = inputs()
    model = read_scvi_tools(folder / "ref_model")
    model.config = model.config.model_copy(update={"likelihood_path": path})

    def batch(batches: list[str]) -> Batch:
        chosen = np.isin(cells["batch"], batches)
        codes = np.array([int(b[1:]) for b in cells["batch"][chosen]])
        with_covariates = bool(model.schema.categorical)
        return batch_of(
            cells["X"][chosen],
            codes,
            categorical=(cells["cat1"][chosen] == "y")[:, None] if with_covariates else None,
            continuous=cells["cont1"][chosen][:, None] if with_covariates else None,
        )

    assert model.schema.genes == tuple(cells["var_names"])
    assert model.schema.batch.values == ("b0", "b1", "b2")
    return Case(folder, model, batch(["b0", "b1", "b2"]), batch(["b3", "b4"]))


def grown_of(case: Case, **config: object) -> Scvi:
    return grow(case.model, five_batches(case.model.schema), seed=0, config=SurgeryConfig(**config))


def same_outputs(model: Scvi, batch: Batch, wanted: Arrays) -> None:
    model.eval()
    with torch.no_grad():
        x_BG = batch.counts.dense(torch.device("cpu"))
        q = model.encode(x_BG, batch)
        near(q.mean_BL, wanted["qz_m"])
        near(q.variance_BL.sqrt(), wanted["qz_scale"])
        losses = model.losses(batch, Step(), None)
        near(losses.terms["reconstruction"], wanted["recon_reconstruction_loss"])
        near(losses.terms["kl"], wanted["kl_kl_divergence_z"])
        near(losses.minimise.mean(), wanted["loss"])
        if "library" not in wanted:
            return
        p = model.decode(q.mean_BL, q.log_library_B1, batch)
        near(q.log_library_B1, wanted["library"])
        near(p.scale_BG[:12], wanted["px_scale"])
        near(p.rate_BG[:12], wanted["px_rate"])
        assert p.log_theta is not None
        near(p.log_theta.exp() if p.log_theta.dim() == 1 else p.log_theta[:12].exp(), wanted["px_r"])
        if p.dropout_BG is not None:
            near(p.dropout_BG[:12], wanted["px_zi_logits"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_reference_outputs(name: str, path: str) -> None:
    case = case_of(name, path)
    same_outputs(case.model, case.reference, case.arrays("expected_ref"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_reference_gradients(name: str, path: str) -> None:
    case = case_of(name, path)
    found = to_state(case.model, gradients(case.model, case.reference))
    wanted = case.arrays("grads_ref_eval_nonoise")
    used = {k: v for k, v in wanted.items() if not k.startswith(("l_encoder", "decoder.px_r_decoder"))}
    if "decoder.px_dropout_decoder.weight" not in found:
        used = {k: v for k, v in used.items() if not k.startswith("decoder.px_dropout_decoder")}
    assert used.keys() <= found.keys()
    for key, value in used.items():
        near(found[key], value)


@pytest.mark.parametrize("name", CASES)
def test_surgery_keeps_the_reference_and_appends(name: str) -> None:
    """What grows has the shape that scvi-tools gives it, and its prefix is the reference."""
    case = case_of(name)
    theirs = case.arrays("query_init_state")
    ours, before = to_state(grown_of(case)), to_state(case.model)
    used = {key: value for key, value in theirs.items() if key in ours}
    assert used
    for key, value in ours.items():
        if key in used:
            assert value.shape == used[key].shape
            reference = before[key]
            if name != "SCVI_covs_genebatch":  # there upstream puts the new columns in the wrong place
                np.testing.assert_array_equal(used[key][:, : reference.shape[1]], reference)
                np.testing.assert_array_equal(value[:, : reference.shape[1]], reference)
        else:
            np.testing.assert_array_equal(value, before[key])


def test_upstream_shifts_covariate_columns_and_we_do_not() -> None:
    """docs/deviations.md: new batch columns go to the end of the batch block, not to the end of the matrix."""
    case = case_of("SCVI_covs_genebatch")
    key = "decoder.px_decoder.fc_layers.Layer 0.0.weight"
    before, ours, theirs = (
        to_state(case.model)[key],
        to_state(grown_of(case))[key],
        case.arrays("query_init_state")[key],
    )
    width = case.model.config.n_latent + 1
    old_cat = before[:, width + 3 :]
    np.testing.assert_array_equal(ours[:, width + 5 :], old_cat)
    np.testing.assert_array_equal(theirs[:, width + 3 : width + 5], old_cat)  # where the new batches should be


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", ["init", "trained"])
@pytest.mark.parametrize("name", CASES)
def test_query_outputs(name: str, state: str, path: str) -> None:
    """Their query weights in our grown model give their outputs."""
    case = case_of(name, path)
    model = grown_of(case)
    load(model, case, state)
    same_outputs(model, case.query, case.arrays(f"expected_query_{state}"))


def load(model: Scvi, case: Case, state: str) -> None:
    whole = to_state(model) | case.arrays("query_init_state")
    if state == "trained":
        whole |= case.arrays("query_trained_state")
    model.load_state_dict(from_state(model, whole))


@pytest.mark.parametrize("name", CASES)
def test_query_gradients(name: str) -> None:
    """With every one-hot column and the decoder's batch norm trainable, as upstream's hooks have it."""
    case = case_of(name)
    model = grown_of(case, train_decoder_norm=True)
    load(model, case, "init")
    for parameter_name, parameter in model.named_parameters():
        if ".conditions." in parameter_name:
            parameter.requires_grad_(True)
    found = to_state(model, gradients(model, case.query))
    for key, value in case.arrays("grads_query_init_eval_nonoise").items():
        if not key.startswith("l_encoder"):
            near(found[key], value)


@pytest.mark.parametrize("name", CASES)
def test_only_new_rows_train(name: str) -> None:
    case = case_of(name)
    model = grown_of(case)
    load(model, case, "init")
    found = to_state(model, gradients(model, case.query))
    assert trainable(model).keys() == delta(model).keys()
    for key, value in case.arrays("grads_query_init_eval_nonoise").items():
        if name == "SCVI_covs_genebatch" or ".0.weight" not in key:
            continue
        n_new = 2
        np.testing.assert_array_equal(found[key][:, :-n_new], 0.0)
        near(found[key][:, -n_new:], value[:, -n_new:])
