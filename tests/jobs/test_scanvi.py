"""scANVI from end to end: trained on a store, resumed, started from scVI, a query mapped with and without labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scarcade.dataloaders.loader import LoaderConfig
from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import UsageError
from scarcade.engine.launch import Worker
from scarcade.engine.world import World
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.mislabelled import contradicted_in
from scarcade.jobs.train import TrainedRun, train
from scarcade.jobs.train_config import TrainConfig, resolved
from scarcade.jobs.train_work import _left_out
from scarcade.models.saved import read, read_delta
from scarcade.models.surgery import reference_hash
from tests.engine.workers import on_workers

SMALL: dict[str, Any] = {
    "model": {"n_hidden": 16, "n_latent": 4},
    "optim": {"log_every": 2, "lr": 4e-3},
    "scale": {"threads": 1},
    "data": {"batch_size": 64},
}
QUICK: dict[str, Any] = {"epochs": 3, "report": {"picture": "pca"}, "optim": {"lr": 0.01}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("scanvi")
    return simulate(folder / "a.zarr", cells=600, genes=150, batches=2, labels=3, seed=2, label_effect=3.0)


def trained(store: Store, out: Path, said: list[Mapping[str, Any]] | None = None, **more: Any) -> TrainedRun:
    options = {"settings": SMALL, "epochs": 2, **more}
    return train(store, "scanvi", out=out, progress=(said if said is not None else []).append, **options)


@pytest.fixture(scope="module")
def reference(store: Store, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return trained(store, tmp_path_factory.mktemp("scanvi") / "run", epochs=20, recipe="scarches")


@pytest.fixture(scope="module")
def query(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of the atlas as if from a new batch; a third of their labels is missing."""
    cells = store.to_anndata([store.schema.batch.values[0]])[:120].copy()
    labels = cells.obs["label"].astype(object)
    labels.iloc[::3] = None
    cells.obs = pd.DataFrame({"batch": "new", "label": labels.to_numpy()}, index=[f"q{i}" for i in range(120)])
    path = tmp_path_factory.mktemp("scanvi") / "donor.h5ad"
    cells.write_h5ad(path)
    return path


def test_it_trains_and_predicts(store: Store, reference: TrainedRun) -> None:
    line = reference.history[-1]
    assert {"train/classification", "train/accuracy", "validation/classification", "validation/accuracy"} <= set(line)
    assert line["validation/accuracy"] > 0.8
    elbo = line["train/reconstruction"] + line["train/z1"] + line["kl_weight"] * line["train/kl"]
    assert line["train/loss"] == pytest.approx(elbo + 50 * line["train/classification"], rel=1e-5)
    truth = np.array(store.schema.labels[0].values, dtype=object)[store.codes("label")]
    predicted = reference.model.predict(store)
    assert (predicted == truth).mean() > 0.85
    soft = reference.model.predict(store, soft=True)
    assert isinstance(soft, pd.DataFrame)
    assert list(soft.columns) == list(store.schema.labels[0].values)
    np.testing.assert_allclose(soft.sum(axis=1), 1.0, rtol=1e-5)
    latent = ad.read_zarr(Path(reference.path) / "model" / "latent.zarr")
    assert latent.obsm["X_scANVI"].shape == (600, 4)


def test_more_epochs_continue_to_the_weights_of_a_longer_run(store: Store, tmp_path: Path) -> None:
    more: dict[str, Any] = {"settings": {**SMALL, "data": {"batch_size": 64, "samples_per_label": 20}}}
    trained(store, tmp_path / "part", epochs=1, **more)
    trained(store, tmp_path / "part", epochs=3, **more)
    trained(store, tmp_path / "whole", epochs=3, **more)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("part", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.long
def test_labels_that_neighbours_contradict_are_not_learnt(store: Store, tmp_path: Path) -> None:
    first = Path(train(store, out=tmp_path / "scvi", settings=SMALL, epochs=3, progress=lambda _: None).path) / "model"
    told: list[str] = []
    weights = {}
    for edit in (False, True):
        run = train(
            store,
            "scanvi",
            out=tmp_path / str(edit),
            init_from=first,
            epochs=1,
            settings={**SMALL, "model": {}, "data": {"edit_labels": edit}},
            progress=lambda line: told.append(str(line.get("note"))),
        )
        weights[edit] = (Path(run.path) / "model" / "model.safetensors").read_bytes()
    wrong = contradicted_in(first, store)
    assert 0 < wrong.sum() < len(wrong) / 2
    assert f"labels of {wrong.sum():,} cells are not learnt: their neighbours have another" in told
    assert weights[False] != weights[True]
    edited = {**SMALL, "data": {"edit_labels": True}}
    with pytest.raises(UsageError, match=r"--data\.edit-labels .*: is for --model scanvi with --init-from"):
        trained(store, tmp_path / "alone", settings=edited)
    other = simulate(tmp_path / "other.zarr", cells=100, genes=store.n_genes, batches=2, labels=3)
    with pytest.raises(UsageError, match="has no latent of the cells of"):
        trained(other, tmp_path / "other", settings={**edited, "model": {}}, init_from=first)
    assert not (tmp_path / "other" / "config.toml").exists()  # before anything began
    by_two = on_workers(2, tmp_path, left_out_by, str(store.path), str(first))
    assert all(cells == np.flatnonzero(wrong).tolist() for cells, _ in by_two)
    assert [len(notes) for _, notes in by_two] == [1, 0]


def left_out_by(world: World, store: str, first: str) -> tuple[list[int], list[Any]]:
    told: list[Any] = []
    config = TrainConfig(init_from=first, data=LoaderConfig(edit_labels=True))
    found = _left_out(Worker(world, told.append, lambda: False), config, open_store(store))
    assert found is not None
    return np.flatnonzero(found).tolist(), told


def test_the_recipe_for_carrying_labels_over_sets_how_both_are_trained(store: Store, tmp_path: Path) -> None:
    small = {**SMALL, "model": {"n_hidden": 8, "n_latent": 4}}
    first = train(store, out=tmp_path / "scvi", recipe="transfer", settings=small, epochs=1, progress=lambda _: None)
    init = Path(first.path) / "model"
    config = resolved({"init_from": str(init)}, name="scanvi", recipe="transfer", store=store)
    assert (config.data.stratify, config.data.edit_labels, config.data.samples_per_label) == (True, True, 100)
    assert config.optim.epochs == 20
    assert config.model["gene_likelihood"] == "zinb"
    given = {"init_from": str(init), "optim": {"epochs": 3}, "data": {"stratify": False}}
    mine = resolved(given, name="scanvi", recipe="transfer", store=store)
    assert (mine.optim.epochs, mine.data.stratify) == (3, False)
    assert resolved({}, recipe="transfer", store=store).data.stratify
    assert not resolved({}, recipe="scarches", store=store).data.stratify


def test_it_starts_from_a_trained_scvi(store: Store, tmp_path: Path) -> None:
    first = train(store, out=tmp_path / "scvi", settings=SMALL, epochs=2, progress=lambda _: None)
    bare = {**SMALL, "model": {}}
    path = Path(first.path) / "model"
    run = trained(store, tmp_path / "scanvi", settings=bare, epochs=None, init_from=path)
    assert run.model.model.config.n_hidden == 16
    assert len(run.history) == 10  # a third of scVI's 400, 10 at most
    with pytest.raises(UsageError, match=r"--model\.n-latent 7: the model in --init-from .* was trained with 4"):
        trained(store, tmp_path / "other", settings={**SMALL, "model": {"n_latent": 7}}, init_from=path)
    with pytest.raises(UsageError, match="scvi cannot start from"):
        train(store, out=tmp_path / "no", settings=SMALL, init_from=path, progress=lambda _: None)


@pytest.mark.parametrize("use_labels", [False, True])
def test_a_query_is_mapped_with_its_classifier_s_labels(
    reference: TrainedRun, query: Path, tmp_path: Path, use_labels: bool
) -> None:
    model = Path(reference.path) / "model"
    settings = {**QUICK, "surgery": {"use_labels": use_labels}}
    result = map_queries(model, query, tmp_path, batch_key="batch", **settings)
    result.raise_if_failed()
    (record,) = result.queries
    assert "scanvi_accuracy" in record["labels"]["label"]
    mapped = ad.read_h5ad(tmp_path / "donor.h5ad")
    before = ad.read_h5ad(query)
    known = before.obs["label"].notna().to_numpy()
    right = mapped.obs["label_scanvi"].astype(str)[known] == before.obs["label"].astype(str)[known]
    assert right.mean() > 0.8
    assert mapped.obsm["X_scANVI"].shape == (120, 4)
    table = mapped.obsm["label_scanvi"]
    assert list(table.columns) == list(reference.model.model.schema.labels[0].values)
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-5)
    whole = read(model)
    grown = read_delta(tmp_path / "donor.delta", whole)
    assert reference_hash(grown) == reference_hash(whole)
    assert grown.schema.n_labels == 3


def test_labels_of_a_query_move_it_only_if_they_are_to(reference: TrainedRun, query: Path, tmp_path: Path) -> None:
    model = Path(reference.path) / "model"
    blank = ad.read_h5ad(query)
    del blank.obs["label"]
    blank.write_h5ad(tmp_path / "donor.h5ad")
    latents = []
    for name, path, use in (("a", query, False), ("b", tmp_path / "donor.h5ad", False), ("c", query, True)):
        settings = {**QUICK, "surgery": {"use_labels": use}}
        map_queries(model, path, tmp_path / name, batch_key="batch", **settings).raise_if_failed()
        latents.append(ad.read_h5ad(tmp_path / name / "donor.h5ad").obsm["X_scANVI"])
    np.testing.assert_array_equal(latents[0], latents[1])
    assert not np.allclose(latents[0], latents[2])
