import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy.stats import nbinom
from sklearn.neighbors import KNeighborsClassifier

from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.synthetic import _negative_binomial, simulate, write_h5ad
from scarcade.engine.errors import StorageError, UsageError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("made") / "atlas.zarr"
    return simulate(path, cells=9000, genes=500, proteins=6, programs=3, unlabelled=0.2, protein_batches=3, seed=1)


@pytest.mark.parametrize("mean", [0.001, 0.3, 1.0, 4.0, 60.0, 3000.0])
@pytest.mark.parametrize("theta", [0.3, 3.0, 50.0])
def test_negative_binomial_is_the_quantile_function(mean: float, theta: float) -> None:
    u = np.random.default_rng(0).random(2000)
    ours = [_negative_binomial(one, mean, theta) for one in u]
    expected = nbinom.ppf(u, theta, theta / (theta + mean))
    assert np.mean(ours == expected) > 0.999  # ppf itself rounds at the steps
    assert np.abs(np.array(ours) - expected).max() <= 1


def test_what_is_in_the_store(store: Store) -> None:
    assert (store.n_cells, store.n_genes) == (9000, 500)
    assert store.schema.batch.name == "batch"
    assert store.schema.labels[0].name == "label"
    assert store.verify() == []
    obs = store.obs()
    assert list(obs.columns) == ["batch", "label", "true_label", "library", "program_0", "program_1", "program_2"]
    shown = obs["label"].notna()
    assert abs(shown.mean() - 0.8) < 0.02
    assert (obs["label"][shown] == obs["true_label"][shown]).all()
    assert (store.codes("label") == -1).mean() == pytest.approx(1 - shown.mean())
    both = store.proteins(0, 9000)
    assert both is not None
    assert np.array_equal(both[1].all(axis=1), store.codes("batch") < 3)
    assert not both[0][~both[1]].any()
    keys = store.keys(0, 9000)
    assert (keys[1:] > keys[:-1]).all()
    assert abs(store.n_before(0.1) - 900) <= 1


def test_the_truth_explains_the_counts(store: Store) -> None:
    """Mean and variance of each gene, given the truth, are those of the model."""
    truth = store.truth()
    assert truth is not None
    options = json.loads(truth["options"])
    obs, label, batch = store.obs(), store.codes("true_label"), store.codes("batch")
    activity = obs[["program_0", "program_1", "program_2"]].to_numpy(float)
    rate = truth["label_profile"][label] * truth["batch_factor"][batch]
    for p in range(3):
        rate *= 1 + activity[:, p : p + 1] * truth["program_loading"][p]
    mean = obs["library"].to_numpy(float)[:, None] * rate / rate.sum(axis=1, keepdims=True)
    kept = 1 - options["dropout"]
    variance = kept * (mean + mean**2 / truth["theta"]) + kept * (1 - kept) * mean**2
    indptr, indices, data = store.read(0, 9000)
    counts = np.zeros((9000, 500))
    counts[np.repeat(np.arange(9000), np.diff(indptr)), indices] = data
    z = (counts - kept * mean).sum(axis=0) / np.sqrt(variance.sum(axis=0))
    assert abs(z.mean()) < 0.2
    assert 0.85 < z.std() < 1.15
    spread = ((counts - kept * mean) ** 2).sum(axis=0) / variance.sum(axis=0)
    assert 0.95 < np.median(spread) < 1.05


def test_labels_and_batches_are_drawn_as_the_truth_says(store: Store) -> None:
    truth = store.truth()
    assert truth is not None
    label, batch = store.codes("true_label"), store.codes("batch")
    for b in range(5):
        share = np.bincount(label[batch == b], minlength=8) / (batch == b).sum()
        assert np.abs(share - truth["label_fractions"][b]).max() < 0.05
    expressed = truth["protein_expressed"][label[batch < 3]] > 0
    both = store.proteins(0, 9000)
    assert both is not None
    counts = both[0][batch < 3]
    assert counts[expressed].mean() > 5 * counts[~expressed].mean()


def test_it_is_sparse_and_its_batches_differ_as_real_ones_do(tmp_path: Path) -> None:
    import scanpy as sc

    store = simulate(tmp_path / "s.zarr", cells=3000, seed=2)
    assert 0.85 < 1 - store.nnz / store.n_cells / store.n_genes < 0.9
    adata = store.to_anndata()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=20)
    for column in ("batch", "label"):
        codes = adata.obs[column].cat.codes.to_numpy()
        nearest = KNeighborsClassifier(15).fit(adata.obsm["X_pca"][:2000], codes[:2000])
        assert nearest.score(adata.obsm["X_pca"][2000:], codes[2000:]) > 0.9, column


def test_the_same_seed_gives_the_same_store(tmp_path: Path) -> None:
    stores = [simulate(tmp_path / f"{k}.zarr", cells=500, genes=50, seed=seed) for k, seed in enumerate((4, 4, 5))]
    assert stores[0].fingerprint == stores[1].fingerprint != stores[2].fingerprint


def test_an_older_store_is_kept(tmp_path: Path) -> None:
    seen: list[int] = []
    simulate(tmp_path / "s.zarr", cells=10, genes=5, progress=seen.append)
    assert seen == [10]
    with pytest.raises(StorageError, match="exists already"):
        simulate(tmp_path / "s.zarr", cells=10, genes=5)
    simulate(tmp_path / "s.zarr", cells=20, genes=5, replace=True)
    assert open_store(tmp_path / "s.zarr").n_cells == 20


def test_batches_as_files_of_their_own(store: Store, tmp_path: Path) -> None:
    write_h5ad(store, tmp_path / "query.h5ad", ["batch1", "batch3"])
    query = ad.read_h5ad(tmp_path / "query.h5ad")
    assert set(query.obs["batch"]) == {"batch1", "batch3"}
    assert query.n_obs == np.isin(store.codes("batch"), [1, 3]).sum()


@pytest.mark.parametrize(
    "wrong",
    [
        {"cells": 0},
        {"genes": 1},
        {"batches": 0},
        {"labels": 0},
        {"seed": -1},
        {"dropout": 1.0},
        {"unlabelled": -0.1},
        {"library": 0.0},
        {"composition": 0.0},
        {"batch_effect": -1.0},
        {"label_effect": float("nan")},
    ],
)
def test_numbers_out_of_range(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')} "):
        simulate(tmp_path / "s.zarr", **wrong)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_million_cells_in_a_gigabyte(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = (
        "import resource, sys; from scarcade.dataloaders.synthetic import simulate;"
        "simulate(sys.argv[1], cells=1_000_000, genes=2000);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "s")], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 1 << 20  # kilobytes
