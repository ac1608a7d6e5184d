"""Embedding: stores and files alike, in order, and only where the model knows the batches."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.schema import DataWarning
from scarcade.dataloaders.store import is_store, open_store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import CategoryError, GenesError, NonFiniteError, StorageError, UsageError
from scarcade.jobs.cells import cells_of
from scarcade.jobs.cli import main
from scarcade.jobs.embed import embed, write_latent
from scarcade.jobs.latent import read_latent
from scarcade.models import Scvi
from scarcade.models.saved import read
from tests.jobs.conftest import Atlas, train_on


@pytest.fixture(scope="module")
def blind(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose encoder does not see the batch."""
    cells = atlas.store.to_anndata()
    for column in ("batch", "label"):
        cells.obs[column] = cells.obs[column].astype(str)
    return train_on(cells, atlas.store, tmp_path_factory.mktemp("blind") / "model", epochs=1, encode_covariates=False)


def test_a_store_and_the_same_cells_in_memory_have_the_same_latent(atlas: Atlas, blind: Path, tmp_path: Path) -> None:
    embed(blind, atlas.store.path, tmp_path / "store.zarr", batch_size=300)
    cells = atlas.store.to_anndata()
    embed(blind, cells, tmp_path / "cells.zarr", batch_key="batch")
    store, memory = read_latent(tmp_path / "store.zarr"), read_latent(tmp_path / "cells.zarr")
    np.testing.assert_allclose(store.mean, memory.mean, atol=1e-5)
    np.testing.assert_allclose(store.variance, memory.variance, rtol=1e-4)
    written = ad.read_zarr(tmp_path / "store.zarr")
    assert list(written.obs_names) == list(cells.obs_names)
    assert list(written.obs["label"].astype(str)) == list(cells.obs["label"].astype(str))
    assert store.about["data"] == atlas.store.fingerprint


def test_the_latent_beside_a_model_holds_no_names(atlas: Atlas) -> None:
    assert list(ad.read_zarr(atlas.model / "latent.zarr").obs_names[:3]) == ["0", "1", "2"]


def test_a_batch_that_the_encoder_needs_and_does_not_know_is_refused(atlas: Atlas, tmp_path: Path) -> None:
    with pytest.raises(CategoryError, match=r"scarcade map.*scarcade merge.*scarcade embed") as told:
        embed(
            atlas.model,
            atlas.query,
            tmp_path / "l.zarr",
            outputs=["expression"],
            settings={"transform_batch": ["batch1"]},
            batch_key="batch",
        )
    assert "transform" not in str(told.value)
    known = atlas.store.to_anndata(["batch1"])
    embed(atlas.model, known, tmp_path / "l.zarr", batch_key="batch")
    assert len(read_latent(tmp_path / "l.zarr")) == known.n_obs


def test_a_batch_that_only_the_decoder_needs_can_be_replaced(atlas: Atlas, blind: Path, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)
    cells.obs["batch"] = "another"
    with pytest.raises(CategoryError, match=r"scarcade merge.*--transform-batch"):
        embed(blind, cells, tmp_path / "l.zarr", outputs=["expression"], batch_key="batch")
    settings = {"transform_batch": ["batch1"]}
    embed(blind, cells, tmp_path / "l.zarr", outputs=["expression"], settings=settings, batch_key="batch")


def test_no_more_cells_than_some_are_computed_at_once(atlas: Atlas) -> None:
    for cells in (atlas.store.path, atlas.store.to_anndata(["batch1"])):
        with pytest.raises(UsageError, match="--batch-size 0"):
            cells_of(cells, read(atlas.model), batch_key=None if cells is atlas.store.path else "batch").loader(0)


def test_a_store_is_seen_with_the_codes_and_genes_of_the_model(atlas: Atlas, tmp_path: Path) -> None:
    """Its batches in another order, its genes in another order."""
    model = read(atlas.model)
    cells = atlas.store.to_anndata(["batch2", "batch0"])
    cells.obs["batch"], cells.obs["label"] = cells.obs["batch"].astype(str), cells.obs["label"].astype(str)
    turned = cells[:, ::-1].copy()
    embed(model, cells, tmp_path / "cells.zarr", batch_key="batch")
    turned.write_h5ad(tmp_path / "turned.h5ad")
    store = ingest([tmp_path / "turned.h5ad"], tmp_path / "turned.zarr", batch_key="batch", label_keys=["label"])
    assert store.schema.genes != model.schema.genes
    embed(model, store.path, tmp_path / "store.zarr")
    memory, streamed = ad.read_zarr(tmp_path / "cells.zarr"), ad.read_zarr(tmp_path / "store.zarr")
    np.testing.assert_allclose(streamed[memory.obs_names].obsm["X_scVI"], memory.obsm["X_scVI"], rtol=1e-4, atol=1e-5)


def test_a_store_with_other_genes_is_refused(atlas: Atlas, tmp_path: Path) -> None:
    store = simulate(tmp_path / "other.zarr", cells=50, genes=20, batches=1, labels=2)
    with pytest.raises(GenesError, match="none of its 20 genes"):
        embed(atlas.model, store.path, tmp_path / "l.zarr")


def stored(cells: ad.AnnData, path: Path) -> Path:
    """A store of these cells."""
    for column in ("batch", "label"):
        cells.obs[column] = cells.obs[column].astype(str)
    cells.write_h5ad(path.with_suffix(".h5ad"))
    return ingest([path.with_suffix(".h5ad")], path, batch_key="batch", label_keys=["label"]).path


@pytest.mark.parametrize("n_genes", [100, 135])
def test_genes_that_are_not_there_are_told_of_a_store_and_of_a_file(
    n_genes: int, atlas: Atlas, blind: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = atlas.store.to_anndata(["batch0"])[:, :n_genes].copy()
    store = stored(cells, tmp_path / "s.zarr")
    genes = tuple(cells.var_names)
    for data in (store, tmp_path / "s.h5ad"):
        with pytest.warns(DataWarning, match=f"{n_genes} of the .*'s 150 genes are there") as told:
            embed(blind, data, tmp_path / "l.zarr", replace=True)
        assert len(told) == 1, [str(one.message) for one in told]
        assert main(["embed", str(blind), str(data), "--out", str(tmp_path / "l.zarr"), "--force"]) == 0
        assert f"warning: {data}: {n_genes} of the" in capsys.readouterr().err
    assert genes == tuple(read(blind).schema.genes[:n_genes])


def test_labels_that_the_model_does_not_know_are_kept(atlas: Atlas, blind: Path, tmp_path: Path) -> None:
    cells = atlas.store.to_anndata(["batch0"])
    known = list(cells.obs["label"].astype(str))
    wanted = [*["another"] * 5, *known[5:]]
    cells.obs["label"] = wanted
    store = stored(cells, tmp_path / "s.zarr")
    for data in (store, tmp_path / "s.h5ad"):
        with pytest.warns(DataWarning, match="labels of 'label' that the model does not know: 'another'"):
            embed(blind, data, tmp_path / "l.zarr", replace=True)
        found = ad.read_zarr(tmp_path / "l.zarr")
        assert list(found[cells.obs_names].obs["label"].astype(str)) == wanted
        with pytest.warns(DataWarning):
            asked = cells_of(data, read(blind))
        codes = asked.codes_of(read(blind).schema.labels[0])
        assert (codes == -1).sum() == 5  # to the model they are no labels
        (batch,) = asked.batches(len(cells))
        assert batch.labels is not None
        assert (batch.labels == -1).sum() == 5


def test_cells_are_taken_from_a_store_as_from_memory(atlas: Atlas, tmp_path: Path) -> None:
    """In any order, repeated, with genes renamed."""
    cells = atlas.store.to_anndata(["batch2", "batch0"])
    model = read(atlas.model)
    store = open_store(stored(cells[:, ::-1].copy(), tmp_path / "s.zarr"))
    rows = np.random.default_rng(0).integers(0, store.n_cells, 300)
    streamed = cells_of(store, model)
    taken, memory = streamed.take(rows), cells_of(cells[list(streamed.names())].copy(), model).take(rows)
    np.testing.assert_array_equal(taken.counts.toarray(), memory.counts.toarray())
    assert taken.counts.has_sorted_indices
    batches = np.array(taken.schema.batch.values)[taken.columns.batch]
    np.testing.assert_array_equal(batches, np.array(memory.schema.batch.values)[memory.columns.batch])
    np.testing.assert_array_equal(taken.columns.labels, memory.columns.labels)


def test_draws_of_outputs_that_nobody_asked_for_are_refused(
    atlas: Atlas, blind: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["embed", str(blind), str(atlas.store.path), "--out", str(tmp_path / "l.zarr"), "--samples", "5"]
    assert main(line) == 2
    assert "--output" in capsys.readouterr().err
    assert not (tmp_path / "l.zarr").exists()


def test_an_existing_result_is_kept(atlas: Atlas, blind: Path, tmp_path: Path) -> None:
    embed(blind, atlas.store.path, tmp_path / "l.zarr")
    with pytest.raises(StorageError, match="exists"):
        embed(blind, atlas.store.path, tmp_path / "l.zarr")
    embed(blind, atlas.store.path, tmp_path / "l.zarr", replace=True)


def test_cells_out_of_order_are_a_bug(atlas: Atlas, blind: Path, tmp_path: Path) -> None:
    shuffled = stream(atlas.store, "all", LoaderConfig(), seed=0)
    with pytest.raises(ValueError, match="not in their order"):
        write_latent(read(blind), shuffled, tmp_path / "l.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_latent_that_is_not_finite_is_told(atlas: Atlas, blind: Path, tmp_path: Path) -> None:
    model = read(blind)
    assert isinstance(model, Scvi)
    with torch.no_grad():
        model.encoder.mean.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        embed(model, atlas.store.path, tmp_path / "l.zarr")
    assert list(tmp_path.iterdir()) == []


def test_what_a_store_is(atlas: Atlas, tmp_path: Path) -> None:
    assert is_store(atlas.store.path)
    assert not is_store(atlas.query)
    assert not is_store(atlas.model)
    assert not is_store(ad.AnnData(np.ones((2, 2), np.float32)))
