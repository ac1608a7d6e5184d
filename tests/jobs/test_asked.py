"""Outputs of every model: the same in memory, in an AnnData and in a file that is written batch by batch."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scarcade.dataloaders.store import Store
from scarcade.engine.errors import CategoryError, GenesError, UsageError
from scarcade.engine.folder import problems
from scarcade.jobs.asked import batches_of, noise_of
from scarcade.jobs.cells import cells_of
from scarcade.jobs.cli import main
from scarcade.jobs.latent import read_latent
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.trained import load
from scarcade.models import MODELS
from tests.every_model import EVERY, made_query, made_store, trained_models

pytestmark = pytest.mark.filterwarnings("ignore::scarcade.dataloaders.schema.DataWarning")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(tmp_path_factory.mktemp("asked") / "a.zarr")


@pytest.fixture(scope="module")
def models(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return trained_models(store, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", EVERY)
def test_all_outputs_of_a_model_are_written_and_filled_in_alike(
    name: str, store: Store, models: Callable[[str], Path], tmp_path: Path
) -> None:
    trained = load(models(name))
    offered = list(trained.model.offered)
    assert "expression" in offered
    out = trained.write(tmp_path / "out.zarr", store, offered, batch_size=70)
    assert problems(Path(out)) == []
    written = ad.read_zarr(out)
    assert written.n_obs == store.n_cells
    np.testing.assert_allclose(read_latent(out).mean, written.obsm[trained.model.obsm_key])

    cells = ad.read_h5ad(store.path.with_suffix(".h5ad"))[list(written.obs_names)].copy()[:, ::-1].copy()
    trained.annotate(cells, offered, batch_key="batch")
    np.testing.assert_allclose(
        cells.obsm[trained.model.obsm_key], written.obsm[trained.model.obsm_key], rtol=1e-4, atol=1e-5
    )
    for output in offered:
        table = trained.output(output, store, batch_size=70)
        assert list(table.index) == list(written.obs_names)
        key = "label_scanvi" if output == "probabilities" else f"{name}_{output}"
        if trained.model.offered[output].genes:
            assert list(table.columns) == list(written.var_names) == list(store.schema.genes)
            np.testing.assert_allclose(written.layers[key], table, rtol=1e-5)
            np.testing.assert_allclose(cells.layers[key][:, ::-1], table, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_allclose(written.obsm[key], table, rtol=1e-5)
            assert json.loads(written.uns["scarcade_outputs"][output]) == list(table.columns)
            np.testing.assert_allclose(cells.obsm[key], table, rtol=1e-4, atol=1e-5)
            assert list(cells.obsm[key].columns) == list(table.columns)


def test_the_likeliest_label_comes_to_obs(store: Store, models: Callable[[str], Path], tmp_path: Path) -> None:
    trained = load(models("scanvi"))
    written = ad.read_zarr(trained.write(tmp_path / "out.zarr", store, ["probabilities"]))
    assert list(written.obs["label_scanvi"].astype(str)) == list(trained.predict(store))
    np.testing.assert_allclose(written.obsm["label_scanvi"].sum(1), 1, rtol=1e-5)


def test_cells_are_decoded_in_the_batches_that_are_named(
    store: Store, models: Callable[[str], Path], tmp_path: Path
) -> None:
    first, second = store.schema.batch.values[:2]
    for name in ("scvi", "trvae", "expimap", "totalvi"):
        trained = load(models(name))
        own, one, other, both = (
            trained.output("expression", store, transform_batch=where).to_numpy()
            for where in (None, first, second, [first, second])
        )
        assert not np.allclose(one, other)
        np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-4, atol=1e-7)
        here = store.codes("batch") == 0
        np.testing.assert_allclose(own[here], one[here], rtol=1e-5)
        with pytest.raises(CategoryError, match="nowhere"):
            trained.output("expression", store, transform_batch="nowhere")
    # proteins of cells that were measured for none are imputed as those of a batch that was
    trained = load(models("totalvi"))
    line = ["embed", str(models("totalvi")), str(store.path), "--out", str(tmp_path / "o.zarr")]
    assert main([*line, "--output", "proteins", "--output", "foreground", "--transform-batch", first]) == 0
    written = ad.read_zarr(tmp_path / "o.zarr")
    np.testing.assert_allclose(
        written.obsm["totalvi_proteins"], trained.output("proteins", store, transform_batch=first), rtol=1e-5
    )


def test_programs_point_where_expression_goes(store: Store, models: Callable[[str], Path]) -> None:
    trained = load(models("expimap"))
    scores = trained.output("programs", store)
    assert isinstance(scores, pd.DataFrame)
    signs = trained.model.directions()[0].numpy()  # type: ignore[operator]
    np.testing.assert_allclose(scores, np.asarray(trained.get_latent_representation(store)) * signs, rtol=1e-5)


def test_draws_are_averaged_and_seeded(store: Store, models: Callable[[str], Path], tmp_path: Path) -> None:
    trained = load(models("scvi"))
    first, again, other = (
        ad.read_zarr(trained.write(tmp_path / f"{i}.zarr", store, ["expression"], n_samples=2, seed=seed)).layers[
            "scvi_expression"
        ]
        for i, seed in enumerate((0, 0, 1))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_allclose(first, trained.output("expression", store, n_samples=2), rtol=1e-5)


def test_an_output_of_two_draws_is_their_mean(store: Store, models: Callable[[str], Path]) -> None:
    trained = load(models("scvi"))
    cells, expression = cells_of(store, trained.model), trained.model.offered["expression"]
    (batch,) = batches_of(cells, trained.model, store.n_cells, decoding=True)
    with torch.no_grad():
        one, two = (
            expression.of(trained.model, batch, noise_of(batch, trained.model, 7, draw=i)).numpy() for i in range(2)
        )
    assert not np.allclose(one, two)
    mean = trained.output("expression", store, n_samples=2, seed=7)
    np.testing.assert_allclose(mean, (one + two) / 2, rtol=1e-5)


def test_what_a_model_does_not_offer_is_refused(store: Store, models: Callable[[str], Path], tmp_path: Path) -> None:
    trained = load(models("scvi"))
    with pytest.raises(UsageError, match="no output 'proteins'; there are expression"):
        trained.write(tmp_path / "o.zarr", store, ["proteins"])
    with pytest.raises(UsageError, match=r"librari: .*there are library_size, transform_batch"):
        trained.output("expression", store, librari=1)
    with pytest.raises(UsageError, match="transform_batch: 'probabilities' takes no such setting"):
        load(models("scanvi")).output("probabilities", store, transform_batch="batch0")
    with pytest.raises(UsageError, match=r"transform_batch: the latent takes no such setting; .*: --output expression"):
        trained.write(tmp_path / "o.zarr", store, transform_batch="batch0")
    few = ad.read_h5ad(store.path.with_suffix(".h5ad"))[:20, :50].copy()
    with pytest.raises(GenesError, match="50 genes"):
        trained.annotate(few, ["expression"], batch_key="batch")
    trained.annotate(few, batch_key="batch")
    assert few.obsm["X_scVI"].shape == (20, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_a_mapped_query_becomes_a_part_of_its_reference(
    name: str, store: Store, models: Callable[[str], Path], tmp_path: Path
) -> None:
    query = made_query(store.path)
    query.write_h5ad(tmp_path / "q.h5ad")
    map_queries(models(name), tmp_path / "q.h5ad", tmp_path / "mapped", batch_key="batch", epochs=2).raise_if_failed()
    line = ["merge", str(models(name)), str(tmp_path / "mapped" / "q.delta"), "--out", str(tmp_path / "whole")]
    assert main([*line, "--data", str(tmp_path / "q.h5ad"), "--batch-key", "batch"]) == 0
    whole = load(tmp_path / "whole")
    assert problems(tmp_path / "whole") == []
    assert whole.model.schema.batch.values == (*store.schema.batch.values, "new")
    assert whole.model.record is not None
    assert [one["new"] for one in whole.model.record["lineage"]] == [{"batch": ["new"]}]
    latent, before = read_latent(tmp_path / "whole" / "latent.zarr"), read_latent(models(name) / "latent.zarr")
    np.testing.assert_array_equal(latent.mean[: len(before)], before.mean)
    mapped = ad.read_h5ad(tmp_path / "mapped" / "q.h5ad").obsm[MODELS[name].obsm_key]
    np.testing.assert_allclose(latent.mean[len(before) :], mapped, atol=1e-5)
    np.testing.assert_allclose(whole.get_latent_representation(query), mapped, atol=1e-5)
    without = Path(load(models(name), delta=tmp_path / "mapped" / "q.delta").save(tmp_path / "without"))
    assert len(read_latent(without / "latent.zarr")) == len(before)
