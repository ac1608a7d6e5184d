"""trVAE and expiMap against numbers of scArches 0.6.1 on models it trained: outputs, losses, gradients, surgery."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch, Schema, Step
from scarcade.models.expimap import Expimap
from scarcade.models.interop.scarches import ScarchesModel, from_state, read_scarches, to_state
from scarcade.models.surgery import delta, grow, trainable
from scarcade.models.trvae import Trvae
from tests.models.cells import batch_of
from tests.shared import shared

CASES = ["trVAE_nb", "trVAE_zinb_mmd", "expiMap"]
PATHS = ["eager", "analytic", "auto"]
TOLERANCE = 1e-5

Arrays = dict[str, np.ndarray]


@dataclass
class Case:
    folder: Path
    model: ScarchesModel
    reference: Batch
    query: Batch

    def arrays(self, name: str) -> Arrays:
        with np.load(self.folder / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)


def case_of(name: str, path: str = "eager") -> Case:
    folder = shared(f"parity/{name}")
    with np.load(shared("parity/inputs.npz"), allow_pickle=False) as file:
        cells = dict(file)
    model = read_scarches(folder / "ref_model")
    model.config = model.config.model_copy(update={"likelihood_path": path})

    def batch(batches: list[str]) -> Batch:
        chosen = np.isin(cells["batch"], batches)
        return batch_of(cells["X"][chosen], np.array([int(b[1:]) for b in cells["batch"][chosen]]))

    assert model.schema.genes == tuple(cells["var_names"])
    assert model.schema.batch.values == ("b0", "b1", "b2")
    return Case(folder, model, batch(["b0", "b1", "b2"]), batch(["b3", "b4"]))


def grown_of(case: Case) -> ScarchesModel:
    schema = case.model.schema.to_dict()
    schema["batch"]["values"] = ("b0", "b1", "b2", "b3", "b4")
    return grow(case.model, Schema.from_dict(schema), seed=0)


def near(found: np.ndarray | torch.Tensor, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Relative to the largest value of the tensor (entries near zero are rounding in both)."""
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * float(np.abs(wanted).max(initial=1e-30)))


def loss_of(model: ScarchesModel, batch: Batch) -> torch.Tensor:
    losses = model.losses(batch, Step(), None)
    return losses.minimise.mean() + (0 if losses.penalty is None else losses.penalty)


def same_outputs(model: ScarchesModel, batch: Batch, wanted: Arrays) -> None:
    model.eval()
    with torch.no_grad():
        x_BG = batch.counts.dense(torch.device("cpu"))
        mean_BL, variance_BL = model.encode(x_BG, x_BG.sum(-1), batch)
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


def gradients(model: ScarchesModel, batch: Batch) -> Arrays:
    """The gradients of the mean loss, without noise, in the layout of scArches."""
    model.eval()
    model.zero_grad(set_to_none=True)
    loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
    return to_state(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


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
    found = gradients(case.model, case.reference)
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
    found = gradients(model, case.query)
    assert trainable(model).keys() == delta(model).keys()
    wanted = case.arrays("grads_query_init_eval_nonoise")
    assert len(wanted) == len(trainable(model))
    for key, value in wanted.items():
        near(found[key], value)
        np.testing.assert_array_equal(found[key][:, :3], 0.0)
