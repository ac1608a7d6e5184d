"""Tables of an .h5ad, read as anndata reads them."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from scarcade.dataloaders.frames import plain_frame


def table(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "whole": rng.integers(0, 9, n),
            "small": rng.integers(0, 9, n).astype(np.uint8),
            "number": np.where(rng.random(n) < 0.3, np.nan, rng.random(n)),
            "flag": rng.random(n) < 0.5,
            "text": [f"ä{i}" for i in range(n)],
            "category": pd.Categorical([["b", "a", None][i % 3] for i in range(n)], categories=["b", "a", "unused"]),
            "ordered": pd.Categorical([i % 2 for i in range(n)], categories=[1, 0], ordered=True),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    return frame


@pytest.mark.parametrize("n", [0, 1, 50])
def test_a_plain_table_is_what_anndata_reads(n: int, tmp_path: Path) -> None:
    frame = table(n).rename_axis("barcode") if n == 50 else table(n)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        ad.io.write_elem(file, "obs", frame)
        ad.io.write_elem(file, "empty", frame[[]])
        for key in ("obs", "empty"):
            found = plain_frame(file[key])
            assert found is not None
            pd.testing.assert_frame_equal(found, ad.io.read_elem(file[key]))


@pytest.mark.parametrize("column", [pd.array([1, None]), pd.array([True, None])])
def test_other_encodings_are_left_to_anndata(column: pd.api.extensions.ExtensionArray, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        ad.io.write_elem(file, "obs", pd.DataFrame({"a": column}, index=["x", "y"]))
        file["old"] = np.zeros(3, dtype=[("index", "S4"), ("a", "f4")])
        assert plain_frame(file["obs"]) is None
        assert plain_frame(file["old"]) is None
