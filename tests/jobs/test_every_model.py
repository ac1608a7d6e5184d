"""What must hold for every model: the same cells on any number of workers, and surgery that leaves it alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pytest
import torch

from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.schema import read_query
from scarcade.dataloaders.store import Store
from scarcade.engine.config import checked, merged
from scarcade.engine.contracts import Batch, Step
from scarcade.engine.world import World
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.one_query import map_query
from scarcade.jobs.query_settings import QueryData, QueryOptim, QuerySurgery
from scarcade.jobs.reference import Reference, TransferConfig, load_reference
from scarcade.jobs.train import train
from scarcade.jobs.train_config import TrainConfig, resolved
from scarcade.jobs.train_work import _stream
from scarcade.models import MODELS
from scarcade.models.surgery import grow, reference_hash
from tests.every_model import EVERY, made_query, made_store, recipe_of, settings_of

Change = Callable[[ad.AnnData], ad.AnnData]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(tmp_path_factory.mktemp("every") / "a.zarr")


def dealt(config: TrainConfig, store: Store, split: Literal["train", "validation"], workers: list[World]) -> list[Any]:
    """Rows of the cells of each step of two epochs, over all workers; and those of the labelled cells beside."""

    def rows(parts: list[Batch | None]) -> list[int]:
        return sorted(np.concatenate([[], *(part.rows for part in parts if part is not None)]).tolist())

    loaders = [_stream(store, split, config, world) for world in workers]
    steps = []
    for epoch in (0, 1):
        for parts in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            steps.append((rows([*parts]), rows([part.labelled for part in parts]), parts[0].n_global))
    return steps


@pytest.mark.parametrize("name", EVERY)
def test_any_number_of_workers_is_dealt_the_same_batches(name: str, store: Store) -> None:
    config = resolved(settings_of(name, store.schema), name=name, store=store)
    splits: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    for split in splits:
        alone = dealt(config, store, split, [World()])
        for size in (2, 3):
            assert dealt(config, store, split, [World(rank, size) for rank in range(size)]) == alone
        assert all(len(rows) == n for rows, _, n in alone)
        assert all(bool(labelled) == MODELS[name].labelled_beside for _, labelled, _ in alone)


VARIANTS: dict[str, dict[str, Any]] = {
    "scvi, latent library": {"use_observed_lib_size": False},
    "scvi, dispersion of a batch": {"dispersion": "gene-batch", "use_batch_norm": "both"},
    "scanvi, batch norm": {"use_batch_norm": "both", "use_layer_norm": "none", "encode_covariates": True},
    "trvae, mse and mmd on y": {"recon_loss": "mse", "mmd_on": "y"},
    "trvae, batch norm": {"norm": "batch", "recon_loss": "nb"},
    "expimap, hard mask": {"soft_mask": False, "alpha_l1": 0.0, "n_ext": 0, "use_hsic": False, "gamma_ext": 0.0},
    "totalvi, latent library": {"use_observed_lib_size": False, "gene_likelihood": "zinb"},
}
"""References beside those of `settings_of`: "name, what is special" -> settings of the model."""
SURGERIES: dict[str, list[dict[str, Any]]] = {
    "scanvi": [{"use_labels": True}],
    "expimap": [{"model": {"n_ext": 2, "use_hsic": True, "gamma_ext": 0.1}}],
    "expimap, hard mask": [{"model": {"new_programs": {"new": ["ENSG00000000001", "ENSG00000000007"]}, "n_ext": 1}}],
}
"""Settings of surgery beside those that every model is tried with."""


def _itself(cells: ad.AnnData) -> ad.AnnData:
    return cells


def _unlabelled(cells: ad.AnnData) -> ad.AnnData:
    cells.obs["label"] = None
    return cells


def _labelled(cells: ad.AnnData) -> ad.AnnData:
    cells.obs["label"] = cells.obs["true_label"]
    return cells


def _one_class(cells: ad.AnnData) -> ad.AnnData:
    cells.obs["label"] = cells.obs["true_label"].cat.categories[1]
    return cells


def _without_proteins(cells: ad.AnnData) -> ad.AnnData:
    del cells.obsm["proteins"]
    return cells


QUERIES: dict[str, dict[str, Change]] = {
    "scanvi": {"no labels": _unlabelled, "all labels": _labelled, "one class": _one_class},
    "totalvi": {"RNA alone": _without_proteins},
}
"""Kinds of queries beside a plain one."""
REFERENCES = [*EVERY, *VARIANTS]


@pytest.fixture(scope="module")
def references(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """A trained reference by its title; each is trained once."""
    folder = tmp_path_factory.mktemp("references")
    made: dict[str, Reference] = {}

    def reference(title: str) -> Reference:
        if title not in made:
            name = title.partition(",")[0]
            raw = merged(settings_of(name, store.schema), {"model": VARIANTS.get(title, {})})
            train(store, name, out=folder / title, recipe=recipe_of(name), settings=raw, progress=lambda _: None)
            made[title] = load_reference(folder / title / "model", TransferConfig())
        return made[title]

    return reference


def _latents(model: Any, store: Store) -> list[np.ndarray]:
    """Mean, variance and loss of all cells of the reference."""
    parts = []
    for batch in stream(store, "all", LoaderConfig(batch_size=128, validation=0), seed=0, lanes=1, shuffle=False).epoch(
        0
    ):
        with torch.no_grad():
            loss = model.losses(batch, Step(), None).terms["reconstruction"]
        parts.append([*(part.numpy().copy() for part in model.embed(batch)), loss.numpy().copy()])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


TRIED: list[dict[str, Any]] = [{}, {"query_mode": "train", "train_decoder_norm": True}]


@pytest.mark.long
@pytest.mark.parametrize("title", REFERENCES)
def test_surgery_leaves_the_reference_as_it_was(
    title: str, store: Store, references: Callable[[str], Reference]
) -> None:
    reference = references(title)
    before, latents = reference_hash(reference.model), _latents(reference.model, store)
    settings = [*TRIED, *SURGERIES.get(title, [])]
    tried: list[tuple[str, Change, dict[str, Any]]] = [("plain", _itself, one) for one in settings]
    tried += [(kind, change, settings[-1]) for kind, change in QUERIES.get(title, {}).items()]
    for kind, change, surgery in tried:
        query = read_query(change(made_query(store.path)), reference.schema, batch_key="batch", name="q")
        mapped = map_query(
            reference,
            query,
            optim=QueryOptim(epochs=2, weight_decay=0.1, lr=0.05, kl_epochs=1),
            data=QueryData(batch_size=32),
            surgery=checked(QuerySurgery, surgery),
            seed=1,
        )
        what = f"{kind}, {surgery}"
        norms = bool(surgery.get("train_decoder_norm"))
        assert reference_hash(reference.model) == before, what
        assert norms or reference_hash(mapped.model) == before, what
        mean, variance, reconstruction = _latents(mapped.model, store)
        shared = reference.model.n_latent
        np.testing.assert_array_equal(mean[:, :shared], latents[0], what)
        np.testing.assert_array_equal(variance[:, :shared], latents[1], what)
        if not norms and mean.shape[1] == shared:
            np.testing.assert_array_equal(reconstruction, latents[2], what)
        assert (mapped.steps > 0) == (reference.model.surgery_notice is None)
        assert np.isfinite(mapped.mean).all()


@pytest.mark.parametrize("title", REFERENCES)
def test_what_is_found_once_is_found_for_new_batches_alone(
    title: str, store: Store, references: Callable[[str], Reference]
) -> None:
    """`observe` of a model grown without a new batch leaves what it knows of the reference's."""
    model = references(title).model
    grown = grow(model, model.schema, seed=0)
    if grown.observes:
        grown.observe(stream(store, "validation", LoaderConfig(validation=0.3), seed=0).epoch(0))
    assert reference_hash(grown) == reference_hash(model)


def _shuffled(cells: ad.AnnData) -> ad.AnnData:
    return cells[:, np.random.default_rng(0).permutation(cells.n_vars)].copy()


def _with_strangers(cells: ad.AnnData) -> ad.AnnData:
    strangers = ad.AnnData(np.full((cells.n_obs, 20), 7, np.float32), obs=cells.obs[[]])
    strangers.var_names = [f"ENSG99{i:09d}" for i in range(20)]
    mixed = ad.concat([cells, strangers], axis=1, merge="first")
    mixed.obs, mixed.obsm["proteins"] = cells.obs, cells.obsm["proteins"]
    return mixed


def _versioned(cells: ad.AnnData) -> ad.AnnData:
    cells.var_names = [f"{name}.{12 + i % 3}" for i, name in enumerate(cells.var_names)]
    return cells


def _lacking(cells: ad.AnnData) -> ad.AnnData:
    return cells[:, 10:].copy()


def _zeros(cells: ad.AnnData) -> ad.AnnData:
    """As `_lacking`, said otherwise."""
    dense = cells.X.toarray()
    dense[:, :10] = 0
    cells.X = dense
    return cells


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_how_a_query_spells_its_genes_changes_nothing(
    name: str, store: Store, references: Callable[[str], Reference], tmp_path: Path
) -> None:
    reference = references(name)
    key = reference.model.obsm_key

    def mapped(title: str, *changes: Change) -> ad.AnnData:
        cells = made_query(store.path)
        for change in changes:
            cells = change(cells)
        (tmp_path / title).mkdir()
        cells.write_h5ad(tmp_path / title / "donor.h5ad")
        result = map_queries(
            reference.path,
            tmp_path / title / "donor.h5ad",
            tmp_path / title / "out",
            batch_key="batch",
            epochs=2,
            optim={"lr": 0.01},
        )
        result.raise_if_failed()
        return ad.read_h5ad(tmp_path / title / "out" / "donor.h5ad")

    plain = mapped("plain")
    found = mapped("spelled", _with_strangers, _shuffled, _versioned)
    np.testing.assert_array_equal(found.obsm[key], plain.obsm[key])
    np.testing.assert_array_equal(found.obs["label_pred"].astype(str), plain.obs["label_pred"].astype(str))
    lacking, zeros = mapped("lacking", _lacking, _shuffled), mapped("zeros", _zeros)
    np.testing.assert_array_equal(lacking.obsm[key], zeros.obsm[key])
    assert not np.array_equal(lacking.obsm[key], plain.obsm[key])
