"""Merging a mapped query into its reference: its cells have the batches that the mapping gave them, or are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.store import Store
from scarcade.engine.errors import CategoryError
from scarcade.jobs.cli import main
from scarcade.jobs.latent import read_latent
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.train import train
from scarcade.jobs.trained import load
from scarcade.models.saved import read
from tests.every_model import made_query, made_store, settings_of, trained_models

pytestmark = pytest.mark.filterwarnings("ignore::scarcade.dataloaders.schema.DataWarning")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(tmp_path_factory.mktemp("merge") / "a.zarr")


@pytest.fixture(scope="module")
def references(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return trained_models(store, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scVI as it is by default, whose encoder does not see the batch."""
    out = tmp_path_factory.mktemp("plain")
    train(store, out=out, settings=settings_of("scvi", store.schema), progress=lambda _: None)
    return out / "model"


def mapped(reference: Path, query: ad.AnnData, folder: Path, **more: Any) -> tuple[Path, np.ndarray]:
    """The file of the query, and the latent of its cells."""
    folder.mkdir(exist_ok=True)
    query.write_h5ad(folder / "donor.h5ad")
    map_queries(reference, folder / "donor.h5ad", folder / "mapped", epochs=2, **more).raise_if_failed()
    return folder / "donor.h5ad", ad.read_h5ad(folder / "mapped" / "donor.h5ad").obsm["X_scVI"]


@pytest.mark.parametrize("scarches", [True, False])
def test_cells_of_a_batch_that_the_model_does_not_know_are_refused(
    scarches: bool, store: Store, plain: Path, references: Callable[[str], Path], tmp_path: Path
) -> None:
    reference = references("scvi") if scarches else plain
    for data in (made_query(store.path), stored(made_query(store.path), tmp_path / "q.zarr")):
        with pytest.raises(CategoryError, match=r"does not know the batch 'new'.*--batch-key"):
            load(reference).save(tmp_path / "out", data)
        assert not (tmp_path / "out").exists()


def stored(cells: ad.AnnData, path: Path) -> Path:
    cells.obs["label"] = cells.obs["label"].astype(object)
    cells.write_h5ad(path.with_suffix(".h5ad"))
    ingest(path.with_suffix(".h5ad"), path, batch_key="batch", label_keys=["label"], report=lambda _: None)
    return path


@pytest.mark.parametrize("column", ["new", "batch0", None])
def test_a_query_mapped_without_a_batch_key_is_the_batch_named_after_its_file(
    column: str | None, store: Store, references: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever the reference's batch column says of its cells, and under whatever name the file is now."""
    query = made_query(store.path, column or "none")
    if column is None:
        del query.obs["batch"]
    file, latent = mapped(references("scvi"), query, tmp_path / "q")
    moved = file.rename(tmp_path / "moved.h5ad")
    line = ["merge", str(references("scvi")), str(tmp_path / "q" / "mapped" / "donor.delta"), "--data", str(moved)]
    assert main([*line, "--out", str(tmp_path / "whole")]) == 0
    assert read(tmp_path / "whole").schema.batch.values == (*store.schema.batch.values, "donor")
    found = read_latent(tmp_path / "whole" / "latent.zarr")
    np.testing.assert_allclose(found.mean[300:], latent, atol=1e-5)
    batch = found.column("batch")
    assert batch is not None
    assert set(batch[1][300:]) == {3}
    # what is merged is no delta any more: its cells have batches of their own
    with pytest.raises(CategoryError, match="does not know the batch"):
        load(tmp_path / "whole").save(tmp_path / "more", made_query(store.path, "other"))


def test_cells_of_a_store_are_taken_as_they_were_mapped_too(
    store: Store, references: Callable[[str], Path], tmp_path: Path
) -> None:
    query = made_query(store.path)
    _, latent = mapped(references("scvi"), query, tmp_path / "q")
    data = stored(query, tmp_path / "s.zarr")
    merged = load(references("scvi"), delta=tmp_path / "q" / "mapped" / "donor.delta")
    whole = Path(merged.save(tmp_path / "whole", data))
    found = read_latent(whole / "latent.zarr")
    np.testing.assert_allclose(np.sort(found.mean[300:], axis=0), np.sort(latent, axis=0), atol=1e-5)
    batch = found.column("batch")
    assert batch is not None
    assert set(batch[1][300:]) == {3}


def test_cells_mapped_by_another_column_want_it_again(
    store: Store, references: Callable[[str], Path], tmp_path: Path
) -> None:
    """Their batch column has values that the reference knows: its rows would be taken in silence."""
    query = made_query(store.path, str(store.schema.batch.values[0]))
    query.obs["donor"] = np.where(np.arange(query.n_obs) % 2, "d1", "d2")
    file, latent = mapped(references("scvi"), query, tmp_path / "q", batch_key="donor")
    model = load(references("scvi"), delta=tmp_path / "q" / "mapped" / "donor.delta")
    with pytest.raises(CategoryError, match=r"had 'd1', 'd2' from --batch-key donor; give .* the same --batch-key"):
        model.save(tmp_path / "whole", file)
    assert not (tmp_path / "whole").exists()
    model.save(tmp_path / "whole", file, batch_key="donor")
    np.testing.assert_allclose(read_latent(tmp_path / "whole" / "latent.zarr").mean[300:], latent, atol=1e-5)
