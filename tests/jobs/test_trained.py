from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.contracts import Noise, Step
from scarcade.engine.errors import CategoryError, GenesError, ModelFileError, UsageError
from scarcade.jobs.differential import groups_of, raw_statistics
from scarcade.jobs.trained import Trained, load
from scarcade.models import Scvi
from scarcade.models.saved import save, save_delta
from scarcade.models.surgery import grow

pytestmark = pytest.mark.filterwarnings("ignore::scarcade.dataloaders.schema.DataWarning")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return simulate(
        tmp_path_factory.mktemp("s") / "atlas.zarr", cells=600, genes=40, batches=3, labels=3, label_effect=2
    )


@pytest.fixture(scope="module")
def adata(store: Store) -> anndata.AnnData:
    """The cells of the store, in its order."""
    indptr, indices, data = store.read(0, store.n_cells)
    x = sparse.csr_matrix((data.astype(np.float32), indices, indptr), shape=(store.n_cells, store.n_genes))
    return anndata.AnnData(x, obs=store.obs(), var=pd.DataFrame(index=list(store.schema.genes)))


@pytest.fixture(scope="module")
def model(store: Store) -> Scvi:
    """Trained a little, so that outputs mean something."""
    model = Scvi(Scvi.Config(n_hidden=24, n_latent=5, encode_covariates=True), store.schema)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2, eps=0.01)
    loader = stream(store, "all", LoaderConfig(batch_size=64), seed=0)
    for epoch in range(8):
        for i, batch in enumerate(loader.epoch(epoch)):
            optimiser.zero_grad()
            model(batch, Step(), Noise.of_step(epoch, i, batch)).minimise.mean().backward()
            optimiser.step()
    return model.eval()


@pytest.fixture
def trained(model: Scvi) -> Trained:
    return Trained(model)


OUTPUTS: dict[str, Callable[[Trained, Any], Any]] = {
    "latent": lambda t, d: t.get_latent_representation(d),
    "latent draw": lambda t, d: t.get_latent_representation(d, give_mean=False),
    "expression": lambda t, d: t.get_normalized_expression(d, return_numpy=True, n_samples=2),
    "elbo": lambda t, d: t.get_elbo(d, return_mean=False),
    "reconstruction": lambda t, d: t.get_reconstruction_error(d, return_mean=False)["reconstruction_loss"],
    "marginal": lambda t, d: t.get_marginal_ll(d, return_mean=False, n_mc_samples=3),
    "parameters": lambda t, d: t.get_likelihood_parameters(d)["mean"],
    "predictive": lambda t, d: t.posterior_predictive_sample(d, n_samples=2)[1].toarray(),
    "library": lambda t, d: t.get_latent_library_size(d, give_mean=False),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_store_and_its_cells_in_memory_give_the_same(
    name: str, trained: Trained, store: Store, adata: anndata.AnnData
) -> None:
    from_store, from_path, in_memory = (OUTPUTS[name](trained, data) for data in (store, store.path, adata))
    np.testing.assert_array_equal(from_store, from_path)
    np.testing.assert_allclose(from_store, in_memory, rtol=1e-5, atol=1e-6)
    assert len(from_store) == 600


def test_expression_is_that_of_frequencies(trained: Trained, adata: anndata.AnnData) -> None:
    table = trained.get_normalized_expression(adata)
    assert isinstance(table, pd.DataFrame)
    assert list(table.index) == list(adata.obs_names)
    assert list(table.columns) == list(adata.var_names)
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-4)
    some = trained.get_normalized_expression(adata, gene_list=list(adata.var_names[[3, 1]]), library_size=100)
    np.testing.assert_allclose(some, 100 * table.iloc[:, [3, 1]], rtol=1e-5)
    draws = trained.get_normalized_expression(adata, n_samples=3, return_mean=False)
    assert draws.shape == (3, 600, 40)
    latent = trained.get_normalized_expression(adata, library_size="latent", return_numpy=True)
    assert isinstance(latent, np.ndarray)
    np.testing.assert_allclose(latent.sum(1), np.asarray(adata.X.sum(1)).ravel(), rtol=1e-4)


def test_expression_of_genes_follows_the_cells(trained: Trained, adata: anndata.AnnData) -> None:
    """Decoded means of label and gene agree with the counts': the model has learnt something, in the right order."""
    decoded = trained.get_normalized_expression(adata, n_samples=0, return_numpy=True)
    counts = adata.X.toarray()
    observed = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labels = adata.obs["true_label"].astype(str).to_numpy()
    for label in np.unique(labels):
        inside = labels == label
        assert np.corrcoef(decoded[inside].mean(0), observed[inside].mean(0))[0, 1] > 0.8


def test_the_mean_latent_and_its_variance(trained: Trained, adata: anndata.AnnData) -> None:
    mean, variance = trained.get_latent_representation(adata, return_dist=True)
    np.testing.assert_array_equal(mean, trained.get_latent_representation(adata))
    assert (variance > 0).all()
    draws = [trained.get_latent_representation(adata, give_mean=False, seed=s) for s in range(30)]
    assert np.corrcoef(np.mean(draws, 0).ravel(), mean.ravel())[0, 1] > 0.9


def test_bounds_are_in_order(trained: Trained, adata: anndata.AnnData) -> None:
    elbo, marginal = trained.get_elbo(adata), trained.get_marginal_ll(adata, n_mc_samples=20)
    reconstruction = trained.get_reconstruction_error(adata)["reconstruction_loss"]
    assert elbo < marginal
    assert elbo < -reconstruction


def test_a_batch_that_is_not_known_is_refused_and_never_taken_for_another(
    trained: Trained, adata: anndata.AnnData
) -> None:
    query = adata[:50].copy()
    query.obs["batch"] = "new"
    for name, output in OUTPUTS.items():
        with pytest.raises(CategoryError, match=r"'new'.*scarcade map") as raised:
            output(trained, query)
        assert ("--transform-batch" in str(raised.value)) is not trained.model.encodes_batch, name
    with pytest.raises(CategoryError, match="transform_batch"):
        trained.get_normalized_expression(adata, transform_batch="new")


def test_a_model_that_does_not_look_at_the_batch_embeds_any(store: Store, adata: anndata.AnnData) -> None:
    trained = Trained(Scvi(Scvi.Config(n_hidden=8, n_latent=3), store.schema))
    query = adata[:50].copy()
    query.obs["batch"] = "new"
    np.testing.assert_array_equal(
        trained.get_latent_representation(query), trained.get_latent_representation(adata[:50].copy())
    )
    with pytest.raises(CategoryError, match="new"):
        trained.get_elbo(query)
    known = store.schema.batch.values[:2]
    table = trained.get_normalized_expression(query, transform_batch=known)  # says which batch to decode in
    assert table.shape == (50, 40)


def test_genes_are_matched_by_name(trained: Trained, adata: anndata.AnnData) -> None:
    shuffled = adata[:, np.random.default_rng(0).permutation(40)].copy()
    np.testing.assert_allclose(
        trained.get_latent_representation(shuffled), trained.get_latent_representation(adata), rtol=1e-5
    )
    with pytest.raises(GenesError, match="nonsense"):
        trained.get_normalized_expression(adata, gene_list=["nonsense"])


def test_a_store_of_other_genes_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = simulate(tmp_path / "other.zarr", cells=50, genes=15, batches=3, labels=3)
    with pytest.raises(GenesError, match="--genes"):
        trained.get_latent_representation(other)


def test_differential_expression_finds_the_genes(trained: Trained, adata: anndata.AnnData) -> None:
    counts, labels = adata.X.toarray(), adata.obs["true_label"].astype(str).to_numpy()
    first = np.unique(labels)[0]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    change = np.log2(shares[labels == first].mean(0) + 1e-4) - np.log2(shares[labels != first].mean(0) + 1e-4)
    for settings in ({"mode": "change"}, {"mode": "change", "batch_correction": True}, {"mode": "vanilla"}):
        table = trained.differential_expression(adata, "true_label", first, n_samples_overall=600, **settings)
        assert set(table["comparison"]) == {f"{first} vs Rest"}
        assert len(table) == 40
        score = table["lfc_mean" if settings["mode"] == "change" else "bayes_factor"].loc[list(adata.var_names)]
        assert np.corrcoef(score, change)[0, 1] > 0.8
        np.testing.assert_allclose(
            table["raw_mean1"].loc[list(adata.var_names)], counts[labels == first].mean(0), rtol=1e-5
        )
    every = trained.differential_expression(adata, "true_label", n_samples_overall=60, mode="change")
    assert len(every) == 40 * len(np.unique(labels))


def test_differential_expression_of_a_store_and_of_rows(trained: Trained, store: Store, adata: anndata.AnnData) -> None:
    first = store.schema.labels[0].values[0]
    of_store, of_adata = (
        trained.differential_expression(data, "label", first, n_samples_overall=200, mode="change")
        for data in (store, adata)
    )
    assert list(of_store.index) == list(of_adata.index)
    np.testing.assert_allclose(of_store["proba_de"], of_adata["proba_de"], atol=1e-6)
    mask = (adata.obs["label"] == first).to_numpy()
    by_rows = trained.differential_expression(adata, idx1=mask, n_samples_overall=200, mode="change")
    np.testing.assert_allclose(by_rows["proba_de"], of_adata["proba_de"], atol=1e-6)
    assert "comparison" not in by_rows


def test_differential_expression_says_what_is_wrong(trained: Trained, adata: anndata.AnnData) -> None:
    for arguments, error, said in (
        ({}, UsageError, "groupby"),
        ({"groupby": "nonsense"}, CategoryError, "nonsense"),
        ({"groupby": "label", "group1": "nonsense"}, CategoryError, "nonsense"),
        ({"idx1": np.ones(600, bool)}, CategoryError, "no cells"),
        ({"idx1": np.array([600])}, UsageError, "rows below 600"),
        ({"groupby": "label", "mode": "best"}, UsageError, "mode"),
        ({"groupby": "label", "fdr": 0.1}, UsageError, "fdr"),
    ):
        with pytest.raises(error, match=said):
            trained.differential_expression(adata, **arguments)


def test_load(trained: Trained, adata: anndata.AnnData, tmp_path: Path) -> None:
    save(trained.model, tmp_path / "model", training={}, data_fingerprint=None)
    again = load(tmp_path / "model")
    np.testing.assert_array_equal(again.get_latent_representation(adata), trained.get_latent_representation(adata))
    assert "40 genes, 3 batches" in repr(again)


def test_load_of_a_delta(trained: Trained, adata: anndata.AnnData, tmp_path: Path) -> None:
    save(trained.model, tmp_path / "model", training={}, data_fingerprint=None)
    reference = load(tmp_path / "model")
    schema = replace(reference.model.schema, batch=reference.model.schema.batch.extended(("new",)))
    grown = grow(reference.model, schema, seed=0)
    assert reference.model.fingerprint is not None
    save_delta(grown, tmp_path / "q.delta", parent=reference.model.fingerprint, training={})
    query = adata[:50].copy()
    query.obs["batch"] = "new"
    latent = load(tmp_path / "model", delta=tmp_path / "q.delta").get_latent_representation(query)
    assert np.isfinite(latent).all()
    with pytest.raises(ModelFileError, match="delta=FOLDER"):
        load(tmp_path / "q.delta")


def test_raw_statistics_of_all_pairs_come_from_one_pass(store: Store, adata: anndata.AnnData) -> None:
    column = adata.obs["label"].astype(str).to_numpy()
    pairs = groups_of(600, lambda _: column, groupby="label")
    once = stream(store, "all", LoaderConfig(batch_size=70), seed=0, lanes=1, shuffle=False).epoch(0)
    found = raw_statistics(once, 40, pairs)
    assert len(found) == len(pairs) == 3
    counts = adata.X.toarray()
    shares = 1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for pair, raw in zip(pairs, found, strict=True):
        for i, rows in enumerate((pair.rows1, pair.rows2)):
            np.testing.assert_allclose(raw.mean[i], counts[rows].mean(0), rtol=1e-6)
            np.testing.assert_allclose(raw.non_zero[i], (counts[rows] > 0).mean(0), rtol=1e-6)
            np.testing.assert_allclose(raw.normalised_mean[i], shares[rows].mean(0), rtol=1e-4)
