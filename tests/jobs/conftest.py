"""A small made atlas, a reference trained on all but one of its batches, and that batch as a query."""

from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scarcade.dataloaders.loader import Columns, LoaderConfig, in_memory
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.loop import fit
from scarcade.engine.optim import OptimConfig
from scarcade.engine.schema import Categories
from scarcade.jobs.embed import write_latent
from scarcade.models.saved import save
from scarcade.models.scvi import Scvi


@dataclass(frozen=True)
class Atlas:
    store: Store
    model: Path  # encodes covariates, carries its latent
    query: Path  # the batch that the model does not know

    @property
    def new_batch(self) -> str:
        return self.store.schema.batch.values[-1]


def train_on(
    cells: ad.AnnData, store: Store, folder: Path, *, epochs: int = 25, encode_covariates: bool = True
) -> Path:
    """A small scVI of these cells in `folder`, with its latent."""
    known = sorted(set(cells.obs["batch"]))
    schema = replace(store.schema, batch=Categories("batch", tuple(known)))
    batch = np.array([known.index(value) for value in cells.obs["batch"]])
    labels = np.array([schema.labels[0].codes()[value] for value in cells.obs["label"]])
    config = LoaderConfig(batch_size=128, validation=0.0)
    counts, columns = cells.X.tocsr(), Columns(batch=batch, labels=labels)
    loader = in_memory(counts, columns, schema, config, seed=0)
    settings = {"use_layer_norm": "both", "use_batch_norm": "none"} if encode_covariates else {}
    model = Scvi(
        Scvi.Config(n_hidden=32, n_latent=6, gene_likelihood="nb", encode_covariates=encode_covariates, **settings),
        schema,
    )
    fit(model, loader, None, OptimConfig(epochs=epochs, kl_epochs=20, lr=4e-3))
    ordered = in_memory(counts, columns, schema, config, seed=0, lanes=1, shuffle=False)
    latent_columns = [(schema.batch, batch), (schema.labels[0], labels)]
    save(
        model,
        folder,
        training={"epochs": epochs},
        data_fingerprint=store.fingerprint,
        beside=lambda work: write_latent(model, ordered, work / "latent.zarr", columns=latent_columns),
    )
    return folder


@pytest.fixture(scope="session")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    folder = tmp_path_factory.mktemp("atlas")
    store = simulate(folder / "all.zarr", cells=2_000, genes=150, batches=4, labels=4, seed=1, label_effect=1.5)
    *known, new = store.schema.batch.values
    cells = store.to_anndata(known)
    cells.obs["batch"], cells.obs["label"] = cells.obs["batch"].astype(str), cells.obs["label"].astype(str)
    query = store.to_anndata([new])
    query.obs_names = [f"query_{i}" for i in range(query.n_obs)]
    query.write_h5ad(folder / "donor.h5ad")
    return Atlas(store, train_on(cells, store, folder / "model"), folder / "donor.h5ad")
