import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scarcade.dataloaders.schema import DataWarning, Query, read_query, text_of
from scarcade.engine.errors import CategoryError, CountsError, GenesError, UsageError
from scarcade.engine.schema import Categories, Schema
from tests.dataloaders.files import adata, written

REFERENCE = Schema(
    tuple(f"g{i:02d}" for i in range(20)),
    Categories("batch", ("b0",)),
    (Categories("cell_type", ("B", "T")),),
)


def dense(query: Query) -> np.ndarray:
    c = query.csr
    out: np.ndarray = sp.csr_matrix((c.data, c.indices, c.indptr), (query.n_cells, REFERENCE.n_genes)).toarray()
    return out


def test_file_and_memory_give_the_same_query(tmp_path: Path) -> None:
    data = adata()
    from_memory = read_query(data, REFERENCE, batch_key="batch", name="mine")
    for path in ("mine.h5ad", "mine.zarr"):
        from_file = read_query(written(data, tmp_path / path), REFERENCE, batch_key="batch")
        assert from_file.name == "mine"
        assert np.array_equal(dense(from_file), data.X.toarray())
        assert np.array_equal(from_file.batch, from_memory.batch)
        assert np.array_equal(dense(from_memory), dense(from_file))
    assert from_memory.batch_key == "batch"
    assert read_query(tmp_path / "mine.h5ad", REFERENCE).batch.tolist() == ["mine"] * 60


def test_permuted_extra_and_versioned_genes_change_nothing() -> None:
    names = tuple(f"ENSG{i:011d}" for i in range(20))
    reference = Schema(names, REFERENCE.batch)
    data = adata(genes=30)
    data.var_names = [f"ENSG{i:011d}" for i in range(30)]
    wanted = read_query(data, reference).csr
    order = np.random.default_rng(0).permutation(30)
    other = data[:, order].copy()
    other.var_names = [f"{name}.{i}" for i, name in enumerate(other.var_names)]
    for layout in ("csr", "csc", "dense"):
        other.X = {"csr": lambda m: m, "csc": lambda m: m.tocsc(), "dense": lambda m: m.toarray()}[layout](
            sp.csr_matrix(other.X)
        )
        for a, b in zip(read_query(other, reference).csr, wanted, strict=True):
            assert np.array_equal(a, b)


def test_missing_genes_warn_below_four_fifths_and_fail_below_half() -> None:
    data = adata()
    few = read_query(data[:, :19].copy(), REFERENCE)
    assert few.alignment.missing == ("g19",)
    assert "19 of the reference's 20 genes" in few.warnings[0]
    with pytest.warns(DataWarning, match=r"15 of the reference's 20 genes are there \(75%\)"):
        read_query(data[:, :15].copy(), REFERENCE)
    with pytest.raises(GenesError, match=r"8 of the reference's 20 genes .* fewer than 50% \(--min-genes\)"):
        read_query(data[:, :8].copy(), REFERENCE)
    with pytest.warns(DataWarning):
        assert read_query(data[:, :8].copy(), REFERENCE, min_genes=0.1).alignment.found == 8
    data.var_names = [f"ENSG{i:011d}" for i in range(20)]
    with pytest.raises(GenesError, match=r"Its names look like Ensembl ids .* wanted are gene symbols"):
        read_query(data, REFERENCE)


def test_a_query_of_no_cells_of_one_and_of_empty_ones() -> None:
    data = adata()
    assert read_query(data[:0].copy(), REFERENCE, batch_key="batch").n_cells == 0
    one = read_query(data[7:8].copy(), REFERENCE)
    assert np.array_equal(dense(one), data.X[7:8].toarray())
    data.X.data[data.X.indptr[3] : data.X.indptr[4]] = 0
    assert dense(read_query(data, REFERENCE))[3].sum() == 0


def test_labels_known_unknown_and_missing() -> None:
    data = adata()
    data.obs["cell_type"] = ["T", "B", "new", "", "unknown", "T"] * 10
    query = read_query(data, REFERENCE, unlabelled=["unknown"])
    assert query.labels[0][:6].tolist() == [1, 0, -1, -1, -1, 1]
    assert query.label_text[0][:6].tolist() == ["T", "B", "new", None, None, "T"]
    assert any("'cell_type' are not in the reference" in line and "new" in line for line in query.warnings)
    data.obs["mine"] = data.obs.pop("cell_type")
    assert (read_query(data, REFERENCE).labels[0] == -1).all()
    assert read_query(data, REFERENCE, label_keys=["mine"]).labels[0][0] == 1
    with pytest.raises(CategoryError, match="no obs column 'theirs'"):
        read_query(data, REFERENCE, label_keys=["theirs"])
    with pytest.raises(UsageError, match="given 2 times"):
        read_query(data, REFERENCE, label_keys=["mine", "mine"])


def test_values_that_mean_no_label_are_remembered_from_ingest() -> None:
    data = adata()
    data.obs["cell_type"] = ["T", "B", "unsure", "new", "T", "T"] * 10
    told = replace(REFERENCE, unlabelled=("unsure",))
    query = read_query(data, told, unlabelled=["new"])
    assert query.label_text[0][:4].tolist() == ["T", "B", None, None]
    assert not any("not in the reference" in line for line in query.warnings)
    assert Schema.from_dict(json.loads(json.dumps(told.to_dict()))) == told
    assert "unlabelled" not in REFERENCE.to_dict()  # so that schemas of before keep their fingerprints


def test_what_must_be_there_for_every_cell() -> None:
    data = adata()
    data.obs["batch"] = data.obs["batch"].astype(object)
    data.obs.loc["c5", "batch"] = None
    with pytest.raises(CategoryError, match=r"\(--batch-key\) is empty for 1 of 60 cells: 'c5'"):
        read_query(data, REFERENCE, batch_key="batch")
    wanted: dict[str, Any] = {"categorical": (Categories("sex", ("f", "m")),), "continuous": ("depth",)}
    reference = Schema(REFERENCE.genes, REFERENCE.batch, size_factor="depth", **wanted)
    query = read_query(data, reference)
    assert np.array_equal(query.continuous[:, 0], data.obs["depth"].to_numpy(np.float32))
    assert query.size_factor is not None
    assert set(query.categorical[0]) == {"f", "m"}
    data.obs.loc["c5", "depth"] = np.inf
    with pytest.raises(CategoryError, match="'depth' is missing or not finite"):
        read_query(data, reference)
    del data.obs["sex"]
    with pytest.raises(CategoryError, match="no obs column 'sex'"):
        read_query(data, reference)


def test_counts_are_checked_in_memory_too() -> None:
    data = adata()
    data.X.data[data.X.indptr[4]] = -3
    with pytest.raises(CountsError, match=rf"cell 'c4', gene 'g{data.X.indices[data.X.indptr[4]]:02d}', -3"):
        read_query(data, REFERENCE, layer="X")
    with pytest.raises(CountsError, match="no matrix holds raw counts"):
        read_query(data, REFERENCE)


def test_text_of_columns() -> None:
    import pandas as pd

    assert text_of(pd.Series(["a", None, np.nan], dtype=object)).tolist() == ["a", None, None]
    assert text_of(pd.Series(pd.Categorical(["x", None, "y"]))).tolist() == ["x", None, "y"]
    assert text_of(pd.Series([1, 2])).tolist() == ["1", "2"]
    assert text_of(pd.Series([1.5, np.nan])).tolist() == ["1.5", None]
    assert text_of(pd.Series([True, False])).tolist() == ["True", "False"]
    assert text_of(pd.Series([], dtype=object)).tolist() == []


def test_raw_of_an_anndata_is_found() -> None:
    data = adata()
    data.raw = data
    data = data[:, :12].copy()
    data.X = np.log1p(sp.csr_matrix(data.X).toarray())
    query = read_query(data, REFERENCE)
    assert (query.counts_from, query.alignment.found) == ("raw.X", 20)
    assert isinstance(data, ad.AnnData)
