"""Small AnnData files of every kind, with known counts."""

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


def counts(n: int, genes: int, seed: int = 0, most: int = 40) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.4, (n, genes)) * rng.integers(1, most, (n, genes))
    return sp.csr_matrix(dense.astype(np.float32))


def adata(n: int = 60, genes: int = 20, *, seed: int = 0, prefix: str = "c", first_gene: int = 0) -> ad.AnnData:
    """`n` cells with obs batch (two), cell_type (three, some empty), depth, sex; genes g00, g01, ..."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(rng.choice([f"b{seed}", "shared"], n)),
            "cell_type": pd.Categorical(rng.choice(["T", "B", "", "unknown"], n)),
            "depth": rng.random(n),
            "sex": rng.choice(["f", "m"], n),
        },
        index=[f"{prefix}{i}" for i in range(n)],
    )
    var = pd.DataFrame(index=[f"g{i:02d}" for i in range(first_gene, first_gene + genes)])
    return ad.AnnData(counts(n, genes, seed), obs=obs, var=var)


def written(data: ad.AnnData, path: Path, *, version: int = 2) -> Path:
    """As .h5ad, or as .zarr of `version`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".h5ad":
            data.write_h5ad(path)
        else:
            with ad.settings.override(zarr_write_format=version, auto_shard_zarr_v3=False):
                data.write_zarr(path)
    return path


def quiet(_: Any) -> None:
    """Takes a decision and says nothing."""
