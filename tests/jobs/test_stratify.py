"""`--data.stratify` from the defaults of a model to the cells that it trains on."""

import tomllib
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.synthetic import simulate
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.train import train

SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "off": {"data": {"stratify": False}}}
SMALL = {"model": {"hidden_layer_sizes": [8], "n_latent": 2}, "checkpoint": {"every_seconds": 1e6}}


def test_trvae_meets_its_batches_equally_often_by_default(tmp_path: Path) -> None:
    made = simulate(tmp_path / "made.zarr", cells=400, genes=20, batches=2, labels=2)
    first, second = (made.to_anndata([name]) for name in ("batch0", "batch1"))
    lopsided = [first, second[:40].copy()]
    for number, cells in enumerate(lopsided):
        cells.write_h5ad(tmp_path / f"{number}.h5ad")
    files = [tmp_path / "0.h5ad", tmp_path / "1.h5ad"]
    store = ingest(files, tmp_path / "atlas.zarr", batch_key="batch", report=lambda line: None)
    weights = {}
    for name, settings in SETTINGS.items():
        run = train(store, "trvae", out=tmp_path / name, epochs=2, settings={**SMALL, **settings})
        weights[name] = run.model.model.state_dict()["scale.bias"].numpy()
        config = tomllib.loads((tmp_path / name / "config.toml").read_text())
        assert config["data"]["stratify"] is (name == "default")
    assert not np.array_equal(weights["default"], weights["off"])

    query = made.to_anndata(["batch0", "batch1"])[:240].copy()
    query.obs["batch"] = ["new0"] * 200 + ["new1"] * 40
    latent = {}
    for name, settings in SETTINGS.items():
        out = tmp_path / f"{name}-mapped"
        map_queries(
            tmp_path / "default" / "model", {"query": query}, out, batch_key="batch", epochs=2, **settings
        ).raise_if_failed()
        latent[name] = ad.read_h5ad(out / "query.h5ad").obsm["X_trVAE"]
    assert not np.array_equal(latent["default"], latent["off"])
