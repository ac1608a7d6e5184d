import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scarcade.dataloaders.counts import Csr
from scarcade.dataloaders.genes import GeneHistograms, most_variable, normalised_variance, read_gene_list
from scarcade.engine.errors import GenesError, OpenError, UsageError
from tests.dataloaders.files import counts
from tests.shared import shared


def as_csr(matrix: object) -> Csr:
    m = matrix
    return Csr(m.indptr.astype(np.int64), m.indices.astype(np.int32), m.data.astype(np.uint32))  # type: ignore[attr-defined]


def chosen(matrix: object, batches: np.ndarray, n_top: int) -> np.ndarray:
    n_batches = int(batches.max()) + 1
    histograms = GeneHistograms(n_batches, matrix.shape[1])  # type: ignore[attr-defined]
    histograms.add(as_csr(matrix), batches)
    return most_variable(np.stack([normalised_variance([(histograms, b)]) for b in range(n_batches)]), n_top)


@pytest.mark.parametrize("n_top", [500, 2000])
def test_the_genes_are_those_of_scanpy(n_top: int) -> None:
    sc = pytest.importorskip("scanpy")
    data = ad.read_h5ad(shared("data/pbmc_multistudy.h5ad"))
    ours = chosen(data.X, data.obs["batch"].astype("category").cat.codes.to_numpy(np.int64), n_top)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sc.pp.highly_variable_genes(
            data, n_top_genes=n_top, flavor="seurat_v3", batch_key="batch", inplace=False
        )
    assert np.isin(ours, np.flatnonzero(theirs["highly_variable"])).mean() >= 0.99


def test_moments_are_exact_however_the_cells_are_split_and_however_large_the_counts(tmp_path: Path) -> None:
    m = counts(300, 30, most=2000)
    whole, first, second = (GeneHistograms(1, 30) for _ in range(3))
    whole.add(as_csr(m), np.zeros(300, np.int64))
    first.add(as_csr(m[:100]), np.zeros(100, np.int64))
    second.add(as_csr(m[100:]), np.zeros(200, np.int64))
    second.save(tmp_path / "h.npz")
    parts = [(first, 0), (GeneHistograms.load(tmp_path / "h.npz"), 0)]
    assert np.array_equal(normalised_variance(parts), normalised_variance([(whole, 0)]))
    n, table, (gene, value, times) = whole.batch(0)
    dense = m.toarray().astype(np.int64)
    sums = (table * np.arange(1, len(table) + 1)[:, None]).sum(0) + np.bincount(gene, value * times, minlength=30)
    assert n == 300
    assert np.array_equal(sums, dense.sum(0))


def test_constant_genes_are_not_variable_and_a_batch_of_one_cell_is_refused() -> None:
    m = counts(100, 30)
    m = m.tolil()
    m[:, 3] = 2
    assert 3 not in chosen(m.tocsr(), np.zeros(100, np.int64), 20)
    with pytest.raises(UsageError, match="at least two"):
        chosen(counts(3, 30), np.array([0, 0, 1]), 5)
    with pytest.raises(UsageError, match="there are 30 genes"):
        most_variable(np.zeros((1, 30)), 31)


def test_a_gene_list_is_one_name_a_line(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("# mine\nCD3E\n\nCD19\n")
    assert read_gene_list(tmp_path / "genes.txt") == ["CD3E", "CD19"]
    (tmp_path / "twice.txt").write_text("A\nA\n")
    with pytest.raises(GenesError, match="stands twice"):
        read_gene_list(tmp_path / "twice.txt")
    with pytest.raises(OpenError, match="union, intersection"):
        read_gene_list("onion")
