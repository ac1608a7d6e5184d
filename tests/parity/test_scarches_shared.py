"""trVAE and expiMap against numbers of scArches 0.6.1 on models it trained: outputs, losses, gradients, surgery."""

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Step
from scarcade.models.expimap import Expimap
from scarcade.models.interop.scarches import ScarchesModel, from_state, read_scarches, to_state
from scarcade.models.surgery import delta, grow, trainable
from scarcade.models.trvae import Trvae
from tests.models.cells import batch_of
from tests.parity.originals import Arrays, SharedCase, five_batches, gradients, inputs, near
from tests.shared import shared

CASES = ["trVAE_nb", "trVAE_zinb_mmd", "expiMap"]
PATHS = ["eager", "analytic", "auto"]

Case = SharedCase[ScarchesModel]


def case_of(name: str, path: str = "eager") -> Case:
    folder = shared(f"parity/{name}")
    cells = inputs()
    model = read_scarches(folder / "ref_model")
    model.config = model.config.model_copy(update={"likelihood_path": path})

    def batch(batches: list[str]) -> Batch:
        chosen = np.isin(cells["batch"], batches)
        return batch_of(cells["X"][chosen], np.array([int(b[1:]) for b in cells["batch"][chosen]]))

    assert model.schema.genes == tuple(cells["var_names"])
    assert model.schema.batch.values == ("b0", "b1", "b2")
    return Case(folder, model, batch(["b0", "b1", "b2"]), batch(["b3", "b4"]))


def grown_of(case: Case) -> ScarchesModel:
    return grow(case.model, five_batches(case.model.schema), seed=0)


def same_outputs(model: ScarchesModel, batch: Batch, wanted: Arrays) -> None:
    model.eval()
    with torch.no_grad():
        x_BG = batch.counts.dense(torch.device("cpu"))
        mean_BL, variance_BL = model.encode(x_BG.sum(-1), batch)
        near(mean_BL, wanted["z_mean"])
        near(variance_BL, np.exp(wanted["z_log_var"]) + 1e-4)
        near(model.embed(batch)[0], wanted["z_mean"])
        losses = model.losses(batch, Step(), None)
        near(losses.terms["reconstruction"], wanted["recon_per_cell"])
        near(losses.terms["kl"], wanted["kl_per_cell"])
        near(losses.terms["reconstruction"].mean(), wanted["recon_mean"])
        near(losses.terms["kl"].mean(), wanted["kl_mean"])
        near(torch.zeros(()) if losses.penalty is None else losses.penalty, wanted["mmd_or_hsic"])
        if "dec_scale" not in wanted:
            return
        assert model.theta is not None
        near(model.theta(batch.batch)[:12].exp(), wanted["dispersion"])
        if isinstance(model, Expimap):
            scale_BG = torch.softmax(model.decode(mean_BL, batch), -1)
        else:
            p = model.decode(mean_BL, batch)
            scale_BG = p.scale_BG
            if p.dropout_BG is not None:
                near(p.dropout_BG[:12], wanted["dec_dropout_logits"])
        near(scale_BG[:12], wanted["dec_scale"])
        near((scale_BG * x_BG.sum(-1, keepdim=True))[:12], wanted["px_rate"])


def load(model: ScarchesModel, case: Case, state: str) -> None:
    whole = to_state(model) | case.arrays("query_init_state")
    if state == "trained":
        whole |= case.arrays("query_trained_state")
    model.load_state_dict(from_state(model, whole))


@pytest.mark.parametrize("name", CASES)
def test_what_the_files_say(name: str) -> None:
    model = case_of(name).model
    assert isinstance(model, Expimap if name == "expiMap" else Trvae)
    assert model.config.hidden_layer_sizes == (24, 24)
    assert model.config.recon_loss == ("zinb" if "zinb" in name else "nb")


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
    for key, value in case.arrays("grads_ref_eval_nonoise").items():
        near(found[key], value)


@pytest.mark.parametrize("name", CASES)
def test_weights_survive_the_way_there_and_back(name: str) -> None:
    model = case_of(name).model
    back = from_state(model, to_state(model))
    assert back.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("name", CASES)
def test_surgery_keeps_the_reference_and_appends(name: str) -> None:
    """What grows has the shape that scArches gives it, and its prefix is the reference."""
    case = case_of(name)
    theirs = case.arrays("query_init_state")
    ours, before = to_state(grown_of(case)), to_state(case.model)
    for key, value in ours.items():
        if key in theirs:
            assert value.shape == theirs[key].shape
            np.testing.assert_array_equal(theirs[key][:, :3], before[key])
            np.testing.assert_array_equal(value[:, :3], before[key])
        else:
            np.testing.assert_array_equal(value, before[key])


@pytest.mark.long
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", ["init", "trained"])
@pytest.mark.parametrize("name", CASES)
def test_query_outputs(name: str, state: str, path: str) -> None:
    """Their query weights in our grown model give their outputs."""
    case = case_of(name, path)
    model = grown_of(case)
    if state == "trained" and name == "trVAE_zinb_mmd":  # theirs decays the reference's columns, ours are frozen
        schema = model.schema
        assert isinstance(model, Trvae)
        model = Trvae(model.config, schema).eval()
        whole = to_state(grown_of(case)) | case.arrays("query_init_state") | case.arrays("query_trained_state")
        model.load_state_dict(from_state(model, whole))
    else:
        load(model, case, state)
    same_outputs(model, case.query, case.arrays(f"expected_query_{state}"))


@pytest.mark.parametrize("name", CASES)
def test_query_gradients_are_of_new_rows_alone(name: str) -> None:
    """Theirs are of whole matrices, but 0 for the columns of other conditions."""
    case = case_of(name)
    model = grown_of(case)
    load(model, case, "init")
    found = to_state(model, gradients(model, case.query))
    assert trainable(model).keys() == delta(model).keys()
    wanted = case.arrays("grads_query_init_eval_nonoise")
    assert len(wanted) == len(trainable(model))
    for key, value in wanted.items():
        near(found[key], value)
        np.testing.assert_array_equal(found[key][:, :3], 0.0)
