"""Responses of chosen cells of a store are written batch by batch, with no more of it in memory."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch

from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.jobs.arithmetic import predict_response
from scarcade.jobs.trained import Trained
from scarcade.models.scgen import Scgen


class Watched(Store):
    """A store that remembers the most names that were asked of it at once."""

    most = 0

    def names(self, start: int, stop: int) -> np.ndarray:
        self.most = max(self.most, stop - start)
        return super().names(start, stop)


def test_chosen_cells_are_streamed(tmp_path: Path) -> None:
    simulate(tmp_path / "a.zarr", cells=500, genes=30, batches=2, labels=3, seed=1)
    store = Watched(tmp_path / "a.zarr")
    torch.manual_seed(0)
    trained = Trained(Scgen(Scgen.Config(hidden_layer_sizes=[8], n_latent=3), store.schema))
    control, stimulated = store.schema.batch.values
    kind = store.schema.labels[0].values[1]
    keys: dict[str, Any] = {"condition_key": "batch", "control": control, "stimulated": stimulated}
    keys |= {"label_key": "label", "batch_size": 64}
    path, shift = predict_response(trained, store, target_label=kind, **keys, out=tmp_path / "r.zarr")
    assert 0 < store.most <= 64
    cells = store.to_anndata()
    chosen = cells[((cells.obs["label"] == kind) & (cells.obs["batch"] == control)).to_numpy()].copy()
    wanted, same = predict_response(trained, cells, target=chosen, **keys)
    written = ad.read_zarr(path)
    assert list(written.obs_names) == list(chosen.obs_names)
    np.testing.assert_allclose(shift, same, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(written.X, wanted, rtol=1e-4, atol=1e-5)
    store.most = 0
    predict_response(trained, store, target=store, **keys, out=tmp_path / "all.zarr")
    assert 0 < store.most <= 64
