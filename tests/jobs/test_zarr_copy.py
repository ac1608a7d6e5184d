"""A zarr AnnData copied into an .h5ad: all that anndata reads from the one it reads from the other."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import MissingChunkError
from scarcade.jobs.zarr_copy import zarr_to_h5ad
from tests.dataloaders.files import adata, written


def everything(n: int = 90) -> ad.AnnData:
    data = adata(n)
    rng = np.random.default_rng(0)
    data.raw = data.copy()
    data = data[:, :15].copy()
    data.layers["dense"] = rng.random((n, 15))
    data.layers["columns"] = sp.csc_matrix(data.X)
    data.obsm["X_pca"] = rng.normal(size=(n, 3)).astype(np.float32)
    data.obsm["table"] = pd.DataFrame({"a": np.arange(n), "b": ["x"] * n}, index=data.obs_names)
    data.obsm["sparse"] = sp.random(n, 4, density=0.2, format="csr", random_state=0)
    data.obsp["graph"] = sp.random(n, n, density=0.05, format="csr", random_state=0)
    data.varm["loadings"] = rng.normal(size=(15, 2))
    data.var["chromosome"] = pd.Categorical(rng.choice(["1", "2", "X"], 15))
    data.obs["maybe"] = pd.array([1, None, 3] * (n // 3), dtype="Int64")
    data.obs["yes"] = rng.random(n) < 0.5
    data.uns = {"text": "words", "number": 3.5, "nested": {"list": np.array(["a", "b"]), "flag": True}}
    return data


def same(one: Any, other: Any) -> None:
    if sp.issparse(one):
        assert one.format == other.format
        assert (one != other).nnz == 0
        assert one.dtype == other.dtype
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    else:
        assert np.array_equal(one, other)
        if isinstance(one, np.ndarray) and one.dtype.kind in "iufb":  # text has another type from each of the readers
            assert one.dtype == other.dtype


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("block", [64, 16 << 20])
def test_every_kind_of_element(tmp_path: Path, version: int, block: int) -> None:
    path = written(everything(), tmp_path / "a.zarr", version=version)
    zarr_to_h5ad(path, tmp_path / "a.h5ad", block=block)
    before, after = ad.read_zarr(path), ad.read_h5ad(tmp_path / "a.h5ad")
    for part in ("X", "obs", "var"):
        same(getattr(before, part), getattr(after, part))
    for part in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
        same(dict(getattr(before, part)), dict(getattr(after, part)))
    same(before.raw.X, after.raw.X)
    same(before.raw.var, after.raw.var)


def test_text_with_gaps_and_the_text_of_pandas(tmp_path: Path) -> None:
    data = adata(30)
    data.obs["gaps"] = pd.array(["a", None, "b"] * 10, dtype="string")
    data.var["whole"] = pd.array(["a", "b"] * 10, dtype="string")
    with ad.settings.override(allow_write_nullable_strings=True):
        path = written(data, tmp_path / "a.zarr")
    zarr_to_h5ad(path, tmp_path / "a.h5ad")
    after = ad.read_h5ad(tmp_path / "a.h5ad")
    assert after.obs["gaps"].isna().sum() == 10
    assert after.obs["gaps"].dropna().tolist() == ["a", "b"] * 10
    assert after.var["whole"].tolist() == ["a", "b"] * 10


def test_a_store_of_ours(tmp_path: Path) -> None:
    store = simulate(tmp_path / "s.zarr", cells=300, genes=30, batches=2, labels=2, seed=0)
    zarr_to_h5ad(store.path, tmp_path / "s.h5ad")
    after, wanted = ad.read_h5ad(tmp_path / "s.h5ad"), store.to_anndata()
    assert (after.X != wanted.X).nnz == 0
    assert list(after.obs_names) == list(wanted.obs_names)
    assert after.X.indices.dtype == np.int32


def test_a_missing_chunk_is_no_row_of_zeros(tmp_path: Path) -> None:
    path = written(adata(200), tmp_path / "a.zarr", version=3)
    chunk = next(file for file in (path / "X" / "data" / "c").rglob("*") if file.is_file())
    chunk.unlink()
    with pytest.raises(MissingChunkError, match="chunks are missing"):
        zarr_to_h5ad(path, tmp_path / "a.h5ad")
