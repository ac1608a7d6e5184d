"""An update of a reference on workers of Ray Train: what it is in this process, and nothing of the reference moves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scarcade.jobs.latent import read_latent
from scarcade.jobs.train import train
from tests.every_model import made_store, same_on_any_workers
from tests.jobs.test_update import QUICK, new_cells, new_store, updated


@pytest.mark.long
def test_two_workers_update_as_none_does(tmp_path: Path) -> None:
    store = made_store(tmp_path / "a.zarr")
    settings = same_on_any_workers("scanvi", store.schema)
    train(store, "scanvi", out=tmp_path / "first", recipe="scarches", settings=settings, progress=lambda _: None)
    reference = tmp_path / "first" / "model"
    data = new_store(new_cells(store, "new")[:, ::-1].copy(), tmp_path / "new.zarr")
    eval_mode = {**QUICK, "optim": {**QUICK["optim"], "mode": "eval"}}
    here = updated(data, reference, tmp_path / "here", settings=eval_mode)
    there = updated(data, reference, tmp_path / "there", settings=eval_mode, workers=2)
    ours, theirs, before = (
        load_file(path / "model.safetensors") for path in (here, there, reference)
    )  # fmt: skip
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(theirs[name][: len(before[name])], before[name])
    np.testing.assert_allclose(
        read_latent(there / "latent.zarr").mean, read_latent(here / "latent.zarr").mean, atol=1e-4
    )
