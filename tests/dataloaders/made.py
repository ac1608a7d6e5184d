"""A small store with everything in it, and what was written."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scarcade.dataloaders.store import CellBlock, Store, StoreWriter, open_store
from scarcade.engine.schema import Categories, Schema


@dataclass(frozen=True)
class Made:
    store: Store
    schema: Schema
    counts: sp.csr_matrix
    obs: pd.DataFrame
    keys: np.ndarray
    proteins: np.ndarray
    measured: np.ndarray


def made_cells(n: int, genes: int, seed: int = 0, density: float = 0.1) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    counts = sp.random(n, genes, density=density, format="csr", random_state=seed)
    counts.data = rng.integers(1, 300, len(counts.data)).astype(np.uint16)
    counts.sort_indices()
    return counts


def make(path: Path, n: int = 3000, genes: int = 50, *, seed: int = 0, block: int = 777, truth: bool = True) -> Made:
    rng = np.random.default_rng(seed)
    counts = made_cells(n, genes, seed)
    names = tuple(f"gene{i}" for i in range(genes))
    schema = Schema(
        names,
        Categories("donor", ("a", "b", "c")),
        (Categories("cell_type", ("x", "y")),),
        (Categories("sex", ("f", "m")),),
        continuous=("age",),
        proteins=("p1", "p2", "p3"),
        size_factor="size",
    )
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(rng.choice(["a", "b", "c"], n), categories=["a", "b", "c"]),
            "cell_type": pd.Categorical(rng.choice(["unknown", "x", "y"], n)),
            "sex": pd.Categorical(rng.choice(["f", "m"], n)),
            "age": rng.random(n),
            "size": rng.random(n).astype(np.float32) + 0.5,
            "note": [f"né {i}" for i in range(n)],
            "kept": rng.random(n) < 0.5,
        },
        index=[f"cell{i}" for i in range(n)],
    )
    keys = np.sort(rng.integers(0, 1 << 63, n).astype(np.uint64) * np.uint64(2))
    proteins = rng.integers(0, 100, (n, 3)).astype(np.uint16)
    measured = rng.random((n, 3)) < 0.7
    with StoreWriter(
        path,
        schema=schema,
        var=pd.DataFrame({"mean": np.arange(genes, dtype=float)}, index=list(names)),
        index_dtype=np.uint16,
        value_dtype=np.uint16,
        seed=seed,
        sources=[{"path": "made"}],
        truth={"theta": np.arange(3.0)} if truth else None,
    ) as writer:
        for start in range(0, n, block):
            part = slice(start, min(n, start + block))
            rows = counts[part]
            writer.append(
                CellBlock(
                    rows.indptr.astype(np.int64),
                    rows.indices.astype(np.uint16),
                    rows.data,
                    keys[part],
                    obs.iloc[part],
                    proteins[part],
                    measured[part],
                )
            )
    return Made(open_store(path), schema, counts, obs, keys, proteins, measured)
