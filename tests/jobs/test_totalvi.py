"""totalVI from end to end: trained on batches with and without proteins, queries of both kinds mapped, imputed."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.schema import DataWarning
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import GenesError, UsageError
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.train import TrainedRun, train
from scarcade.jobs.trained import load
from scarcade.models.saved import read, read_delta
from scarcade.models.surgery import reference_hash

SMALL: dict[str, Any] = {
    "model": {"n_hidden": 16, "n_latent": 4},
    "scale": {"threads": 1},
    "data": {"batch_size": 64},
    "optim": {"kl_steps": 60},
}
QUICK: dict[str, Any] = {"epochs": 3, "report": {"picture": "pca"}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("totalvi")
    return simulate(
        folder / "a.zarr",
        cells=600,
        genes=60,
        batches=3,
        labels=3,
        proteins=12,
        protein_batches=2,
        seed=2,
        label_effect=1.5,
    )


@pytest.fixture(scope="module")
def reference(store: Store, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    out = tmp_path_factory.mktemp("totalvi") / "run"
    return train(store, "totalvi", out=out, recipe="scarches", epochs=15, settings=SMALL)


@pytest.fixture(scope="module")
def query(store: Store) -> ad.AnnData:
    cells = store.to_anndata([store.schema.batch.values[0]])[:120].copy()
    cells.obs["batch"] = "new"
    cells.obs_names = [f"q{i}" for i in range(120)]
    return cells


def test_it_trains_with_the_numbers_of_scvi_tools(reference: TrainedRun) -> None:
    line = reference.history[-1]
    wanted = {"reconstruction_genes", "reconstruction_proteins", "kl_background", "adversary_error"}
    assert {f"train/{name}" for name in wanted} <= set(line)
    assert line["lr"] == 4e-3
    assert line["train/elbo"] < reference.history[0]["train/elbo"]
    model = reference.model.model
    assert float(model.state_dict()["adversary.on"]) == 1.0
    background = model.state_dict()["background.mean.rows"]
    assert (background[:2] > 0.5).all()


def test_outputs_of_stores_and_of_cells(store: Store, reference: TrainedRun) -> None:
    model = reference.model
    known = list(store.schema.batch.values[:2])
    imputed = model.output("proteins", store, transform_batch=known)
    assert imputed.shape == (600, 12)
    assert list(imputed.columns) == list(store.schema.proteins)
    assert model.output("foreground", store).to_numpy().max() <= 1.0
    genes = model.output("genes", store)
    np.testing.assert_allclose(genes.sum(axis=1), 1.0, rtol=1e-4)
    cells = store.to_anndata()
    assert np.shape(model.get_latent_representation(cells)) == (600, 4)
    np.testing.assert_allclose(
        model.get_latent_representation(cells), model.get_latent_representation(store), rtol=1e-3, atol=1e-4
    )
    assert model.get_normalized_expression(cells, n_samples=0).shape == (600, 60)


@pytest.mark.parametrize("with_proteins", [True, False])
def test_a_query_is_mapped(
    store: Store, reference: TrainedRun, query: ad.AnnData, tmp_path: Path, with_proteins: bool
) -> None:
    cells = query.copy()
    if not with_proteins:
        del cells.obsm["protein_counts"], cells.obsm["protein_measured"]
    cells.write_h5ad(tmp_path / "donor.h5ad")
    folder = Path(reference.path) / "model"
    result = map_queries(folder, tmp_path / "donor.h5ad", tmp_path / "out", batch_key="batch", **QUICK)
    (record,) = result.queries
    assert record["state"] == "done", record["reason"]
    told = " ".join(record["warnings"])
    assert ("12 of the model's 12 proteins" in told) == with_proteins
    assert ("has no proteins" in told) == (not with_proteins)
    assert ad.read_h5ad(tmp_path / "out" / "donor.h5ad").obsm["X_totalVI"].shape == (120, 4)
    reference_model = read(folder)
    grown = read_delta(tmp_path / "out" / "donor.delta", reference_model)
    assert reference_hash(grown) == reference_hash(reference_model)
    mapped = load(folder, delta=tmp_path / "out" / "donor.delta")
    known = list(store.schema.batch.values[:2])
    with nullcontext() if with_proteins else pytest.warns(DataWarning, match="has no proteins"):
        imputed = mapped.output("proteins", cells, batch_key="batch", transform_batch=known)
    assert imputed.shape == (120, 12)
    assert np.isfinite(imputed.to_numpy()).all()
    assert (imputed.to_numpy() >= 0).all()


def test_imputed_proteins_are_those_that_the_cells_express(tmp_path: Path) -> None:
    """For cells of the reference without proteins, and for a mapped query of RNA alone."""
    store = simulate(
        tmp_path / "a.zarr",
        cells=1200,
        genes=100,
        batches=3,
        labels=4,
        proteins=12,
        protein_batches=2,
        seed=2,
        label_effect=1.5,
    )
    run = train(
        store, "totalvi", out=tmp_path / "run", recipe="scarches", epochs=20, settings={"scale": {"threads": 1}}
    )
    truth, measured = store.truth(), list(store.schema.batch.values[:2])
    assert truth is not None

    def agreement(cells: ad.AnnData, imputed: Any) -> float:
        """Mean correlation with whether the label of a cell expresses a protein, over proteins that not all do."""
        codes = [store.schema.labels[0].values.index(label) for label in cells.obs["label"].astype(str)]
        there = truth["protein_expressed"][codes]
        varies = there.std(0) > 0
        pairs = zip(np.log1p(imputed.to_numpy())[:, varies].T, there[:, varies].T, strict=True)
        return float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]))

    bare = store.to_anndata([store.schema.batch.values[2]])
    assert agreement(bare, run.model.output("proteins", bare, transform_batch=measured)) > 0.6
    query = store.to_anndata([measured[0]])
    del query.obsm["protein_counts"], query.obsm["protein_measured"]
    query.obs["batch"] = "new"
    map_queries(Path(run.path) / "model", {"q": query}, tmp_path / "out", batch_key="batch", **QUICK).raise_if_failed()
    mapped = load(Path(run.path) / "model", delta=tmp_path / "out" / "q.delta")
    with pytest.warns(DataWarning, match="has no proteins"):
        imputed = mapped.output("proteins", query, batch_key="batch", transform_batch=measured)
    assert agreement(query, imputed) > 0.6


def test_proteins_of_another_panel(reference: TrainedRun, query: ad.AnnData) -> None:
    model = reference.model
    some = query.copy()
    del some.obsm["protein_measured"]
    table = some.obsm.pop("protein_counts")
    some.obs["batch"] = "batch0" if "batch0" in model.model.schema.batch.values else model.model.schema.batch.values[0]
    some.obsm["protein_expression"] = table.iloc[:, [7, 3]]
    with pytest.warns(DataWarning, match="2 of the model's 12 proteins"):
        part = model.get_latent_representation(some, batch_key="batch")
    assert np.isfinite(part).all()
    some.obsm["protein_expression"] = table.rename(columns=lambda name: f"x{name}")
    with pytest.raises(GenesError, match="none of the model's proteins"):
        model.get_latent_representation(some, batch_key="batch")
    some.obsm["proteins"] = table
    with pytest.raises(UsageError, match="leave one"):
        model.get_latent_representation(some, batch_key="batch")


def test_proteins_that_a_store_does_not_have_are_told(reference: TrainedRun, query: ad.AnnData, tmp_path: Path) -> None:
    cells = query.copy()
    cells.obs["batch"], cells.obs["label"] = reference.model.model.schema.batch.values[0], "label0"
    table = cells.obsm["protein_counts"]
    del cells.obsm["protein_counts"], cells.obsm["protein_measured"]
    for name, told in (("none", "has no proteins"), ("some", "2 of the model's 12 proteins are there")):
        if name == "some":
            cells.obsm["adt"] = table.iloc[:, [7, 3]]
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
        store = ingest(
            [tmp_path / f"{name}.h5ad"],
            tmp_path / f"{name}.zarr",
            batch_key="batch",
            protein_key="adt" if name == "some" else None,
        )
        with pytest.warns(DataWarning, match=told):
            latent = reference.model.get_latent_representation(store)
        assert np.isfinite(latent).all()


def test_a_store_without_proteins_is_refused(tmp_path: Path) -> None:
    plain = simulate(tmp_path / "b.zarr", cells=100, genes=20, batches=2, labels=2)
    with pytest.raises(UsageError, match="protein-key"):
        train(plain, "totalvi", out=tmp_path / "run")
