from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.schema import DataWarning, read_query
from scarcade.engine.errors import CountsError, GenesError, UsageError
from scarcade.engine.schema import Categories, Schema
from tests.dataloaders.files import adata, written

REFERENCE = Schema(
    tuple(f"g{i:02d}" for i in range(20)), Categories("batch", ("b0",)), proteins=("CD3", "CD4", "CD8", "CD19")
)


def table(names: list[str], n: int = 60) -> pd.DataFrame:
    values = np.random.default_rng(0).poisson(9.0, (n, len(names))).astype(np.float32)
    return pd.DataFrame(values, columns=names)


def test_proteins_of_a_query_come_in_the_order_of_the_reference(tmp_path: Path) -> None:
    data = adata()
    found = table(["CD19", "CD56", "CD3"])
    found.iloc[4, 0] = np.nan
    data.obsm["protein_expression"] = found.set_index(data.obs_names)
    for source in (data, written(data, tmp_path / "a.h5ad"), written(data, tmp_path / "a.zarr")):
        query = read_query(source, REFERENCE)
        assert query.proteins is not None
        assert query.proteins_measured is not None
        np.testing.assert_array_equal(query.proteins[:, 0], found["CD3"])
        np.testing.assert_array_equal(query.proteins[:, 3], found["CD19"].fillna(0))
        measured = np.tile([True, False, False, True], (60, 1))
        measured[4, 3] = False
        np.testing.assert_array_equal(query.proteins_measured, measured)
        assert any("2 of the model's 4 proteins" in told for told in query.warnings)


def test_what_a_store_says_of_measuring_holds() -> None:
    data = adata()
    names = ["CD3", "CD4", "CD8", "CD19"]
    data.obsm["protein_counts"] = table(names).set_index(data.obs_names)
    mask = np.random.default_rng(1).random((60, 4)) < 0.5
    data.obsm["protein_measured"] = pd.DataFrame(mask, data.obs_names, names)
    query = read_query(data, REFERENCE)
    assert query.proteins is not None
    assert query.proteins_measured is not None
    np.testing.assert_array_equal(query.proteins_measured, mask)
    assert not query.proteins[~mask].any()


@pytest.mark.parametrize("ending", ["", ".h5ad", ".zarr"])
def test_a_mask_without_names_is_in_the_order_of_the_counts(ending: str, tmp_path: Path) -> None:
    data = adata()
    data.obsm["protein_counts"] = (table(["CD19", "CD56", "CD3"]) + 1).set_index(data.obs_names)
    mask = np.random.default_rng(1).random((60, 3)) < 0.5
    data.obsm["protein_measured"] = mask
    query = read_query(written(data, tmp_path / f"a{ending}") if ending else data, REFERENCE)
    assert query.proteins is not None
    assert query.proteins_measured is not None
    np.testing.assert_array_equal(query.proteins_measured[:, [3, 0]], mask[:, [0, 2]])
    assert not query.proteins_measured[:, [1, 2]].any()
    assert not query.proteins[~query.proteins_measured].any()


def test_a_mask_of_other_proteins_is_refused() -> None:
    data = adata()
    names = ["CD3", "CD4", "CD8", "CD19"]
    data.obsm["protein_counts"] = table(names).set_index(data.obs_names)
    for mask in (np.ones((60, 3), bool), pd.DataFrame(np.ones((60, 4), bool), data.obs_names, [*names[:3], "XX"])):
        data.obsm["protein_measured"] = mask
        with pytest.raises(GenesError, match=r"protein_measured.*says nothing of . of the 4 proteins"):
            read_query(data, REFERENCE)


def test_a_query_without_proteins_says_so() -> None:
    data = adata()
    query = read_query(data, REFERENCE)
    assert query.proteins is None
    assert any("has no proteins" in told for told in query.warnings)
    assert not read_query(data, replace(REFERENCE, proteins=())).warnings


def test_what_cannot_be_used_is_told() -> None:
    data = adata()
    data.obsm["mine"] = table(["CD3"]).set_index(data.obs_names)
    query = read_query(data, REFERENCE, protein_key="mine")
    assert query.proteins is not None
    with pytest.raises(UsageError, match="'yours'"):
        read_query(data, REFERENCE, protein_key="yours")
    data.obsm["protein"] = table(["XX"]).set_index(data.obs_names)
    with pytest.raises(GenesError, match="none of the model's proteins"):
        read_query(data, REFERENCE)
    data.obsm["proteins"] = table(["CD3"]).set_index(data.obs_names)
    with pytest.raises(UsageError, match="leave one"):
        read_query(data, REFERENCE)
    odd = adata()
    odd.obsm["protein"] = (table(["CD3"]) + 0.5).set_index(odd.obs_names)
    with pytest.raises(CountsError, match="not counts of a protein"):
        read_query(odd, REFERENCE)


def quiet(line: str) -> None:
    """Instead of printing."""


def test_cells_of_zeros_alone_are_told(tmp_path: Path) -> None:
    """Files that have zeros where nothing was measured are common."""
    data = adata()
    found = table(["CD3", "CD4", "CD8", "CD19"]).set_index(data.obs_names) + 1
    data.obsm["protein_counts"] = found
    assert not any("zeros" in told for told in read_query(data, REFERENCE).warnings)
    found.iloc[7:17] = 0
    assert any("10 cells have zeros alone" in told for told in read_query(data, REFERENCE).warnings)
    data.obs["has"] = np.arange(60) % 2 == 0
    file = written(data, tmp_path / "a.h5ad")
    with pytest.warns(DataWarning, match="10 cells have zeros alone.*--protein-measured-key"):
        ingest([file], tmp_path / "a.zarr", protein_key="protein_counts", report=quiet)
    with pytest.warns(DataWarning, match="5 cells have zeros alone"):
        ingest([file], tmp_path / "b.zarr", protein_key="protein_counts", protein_measured_key="has", report=quiet)
    found.iloc[7:17] = np.nan
    assert not any("zeros" in told for told in read_query(data, REFERENCE).warnings)
