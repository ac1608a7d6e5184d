"""scGen against numbers of scArches 0.6.1 on a model that it trained: latent, decoder, loss, gradients, arithmetic."""

from pathlib import Path

import numpy as np
import torch

from scarcade.engine.contracts import Batch, Step
from scarcade.jobs.exchange import import_model
from scarcade.models.interop.scgen import read_scgen, to_state
from scarcade.models.saved import read
from scarcade.models.scgen import Scgen
from tests.models.cells import batch_of
from tests.parity.originals import Arrays, arrays_in, inputs, near
from tests.shared import shared


def case() -> tuple[Scgen, Batch, np.ndarray]:
    cells = inputs()
    chosen = np.isin(cells["batch"], ["b0", "b1", "b2"])
    batch = cells["batch"][chosen]
    model = read_scgen(shared("parity/scGen/ref_model"))
    # there the KL is summed over the batch
    model.config = model.config.model_copy(update={"kl_weight": 1e-6 * len(batch)})
    return model, batch_of(cells["X"][chosen], np.zeros(len(batch))), batch


def arrays(name: str) -> Arrays:
    return arrays_in(shared(f"parity/scGen/{name}.npz"))


def test_outputs() -> None:
    model, cells, batch = case()
    wanted = arrays("expected_ref")
    with torch.no_grad():
        x_BG = model.expression(cells)
        near(x_BG[:12], wanted["x_norm_log"])
        mean_BL, variance_BL = model.encode(x_BG)
        near(mean_BL, wanted["z_mean"])
        near(variance_BL.log(), wanted["z_log_var"])
        near(model.decode(mean_BL)[:12], wanted["x_hat"])
        losses = model.losses(cells, Step(), None)
        near(losses.terms["reconstruction"].mean(), wanted["mse"])
        near(losses.minimise.mean(), wanted["loss"])
        delta_L = mean_BL[batch == "b1"].mean(0) - mean_BL[batch == "b0"].mean(0)
        near(delta_L, wanted["delta_b0_to_b1_unbalanced"])
        near(model.decode(mean_BL[batch == "b0"] + delta_L)[:12], wanted["pred_b0_plus_delta"])


def test_gradients() -> None:
    model, cells, _ = case()
    model.losses(cells, Step(), None).minimise.mean().backward()  # type: ignore[no-untyped-call]
    found = to_state(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    wanted = arrays("grads_ref_eval_nonoise")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        near(found[key], value)


def test_it_is_imported(tmp_path: Path) -> None:
    model = read(import_model(shared("parity/scGen/ref_model"), tmp_path / "model"))
    assert isinstance(model, Scgen)
    ours, cells, _ = case()
    for found, wanted in zip(model.embed(cells), ours.embed(cells), strict=True):
        assert torch.equal(found, wanted)
