"""Latent arithmetic of scGen on a made response and made batches; and scGen from end to end."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import CategoryError, StorageError, UsageError
from scarcade.engine.folder import problems
from scarcade.jobs.arithmetic import LatentSums, predict_response, response
from scarcade.jobs.correction import CORRECTED, REFERENCE, map_corrected, remove_batches, shifts_of
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.train import TrainedRun, train
from scarcade.jobs.trained import Trained
from scarcade.models.scvi import Scvi

SMALL: dict[str, Any] = {
    "model": {"hidden_layer_sizes": [32, 16], "n_latent": 6},
    "scale": {"threads": 1},
    "data": {"batch_size": 64},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("scgen")
    return simulate(folder / "a.zarr", cells=800, genes=60, batches=3, labels=3, seed=2, label_effect=1.5)


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train(store, "scgen", out=tmp_path_factory.mktemp("scgen") / "run", epochs=25, settings=SMALL)


def means(model: Trained, cells: ad.AnnData, column: str) -> np.ndarray:
    z = np.asarray(model.get_latent_representation(cells))
    values = sorted(set(cells.obs[column].astype(str)))
    return np.stack([z[(cells.obs[column].astype(str) == value).to_numpy()].mean(0) for value in values])


def test_it_trains_with_the_numbers_of_scarches(run: TrainedRun) -> None:
    assert run.history[-1]["train/elbo"] < 0.7 * run.history[0]["train/elbo"]
    assert np.shape(run.model.output("expression", ad.AnnData(np.ones((3, 60), np.float32), var=_var(run)))) == (3, 60)


def _var(run: TrainedRun) -> Any:
    return pd.DataFrame(index=list(run.model.model.schema.genes))


def test_shifts_go_to_the_largest_or_to_the_anchor() -> None:
    n = np.array([[2, 4, 0], [3, 0, 0]])
    mean = np.array([[[1.0], [5.0], [0.0]], [[2.0], [0.0], [0.0]]])
    sums = LatentSums(("r", "s"), ("a", "b", "c"), n, mean * n[:, :, None])
    np.testing.assert_array_equal(shifts_of(sums)[:, :, 0], [[4, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(shifts_of(sums, anchor=0)[:, :, 0], [[0, -4, 0], [0, 0, 0]])
    np.testing.assert_array_equal(shifts_of(sums, anchor=2)[:, :, 0], [[4, 0, 0], [0, 0, 0]])  # it has no cells


def test_a_response_is_the_mean_of_the_labels_responses(store: Store, run: TrainedRun) -> None:
    cells = store.to_anndata()
    one, two = store.schema.batch.values[:2]
    found = response(run.model, store, condition_key="batch", control=one, stimulated=two, label_key="label")
    z = np.asarray(run.model.get_latent_representation(cells))
    label, batch = cells.obs["label"].astype(str).to_numpy(), cells.obs["batch"].astype(str).to_numpy()
    of = {b: np.mean([z[(batch == b) & (label == v)].mean(0) for v in sorted(set(label))], 0) for b in (one, two)}
    np.testing.assert_allclose(found, of[two] - of[one], rtol=1e-4, atol=1e-5)
    plain = response(run.model, cells, condition_key="batch", control=one, stimulated=two)
    np.testing.assert_allclose(plain, z[batch == two].mean(0) - z[batch == one].mean(0), rtol=1e-4, atol=1e-5)


def test_a_label_of_one_condition_alone_does_not_bend_the_response(store: Store, run: TrainedRun) -> None:
    cells = store.to_anndata()
    one, two = store.schema.batch.values[:2]
    held, *others = store.schema.labels[0].values
    settings: dict[str, Any] = {"condition_key": "batch", "control": one, "stimulated": two, "label_key": "label"}
    seen = cells[~((cells.obs["label"] == held) & (cells.obs["batch"] == two)).to_numpy()].copy()
    found = response(run.model, seen, **settings)
    np.testing.assert_allclose(found, response(run.model, cells, labels=others, **settings), rtol=1e-4, atol=1e-5)
    alone = seen[((seen.obs["label"] == held) ^ (seen.obs["batch"] == two)).to_numpy()].copy()
    with pytest.raises(CategoryError, match="of both"):
        response(run.model, alone, **settings)


def test_predicted_cells_are_shifted_and_decoded(store: Store, run: TrainedRun) -> None:
    cells = store.to_anndata()
    one, two = store.schema.batch.values[:2]
    kind = store.schema.labels[0].values[0]
    settings: dict[str, Any] = {"condition_key": "batch", "control": one, "stimulated": two, "label_key": "label"}
    predicted, shift = predict_response(run.model, store, target_label=kind, **settings)
    chosen = (cells.obs["label"] == kind) & (cells.obs["batch"] == one)
    assert list(predicted.index) == list(cells.obs_names[chosen])
    assert shift.shape == (6,)
    again, _ = predict_response(run.model, store, target=cells[chosen.to_numpy()].copy(), **settings)
    np.testing.assert_allclose(predicted, again, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="either"):
        predict_response(run.model, store, **settings)
    with pytest.raises(CategoryError, match="zz"):
        response(run.model, store, condition_key="batch", control="zz", stimulated=two)
    with pytest.raises(UsageError, match="scvi"):
        response(Trained(Scvi(Scvi.Config(), store.schema)), store, condition_key="batch", control=one, stimulated=two)


def test_batches_are_removed_and_a_query_is_placed_among_them(store: Store, run: TrainedRun) -> None:
    *known, new = store.schema.batch.values
    cells, query = store.to_anndata(known), store.to_anndata([new])
    corrected = remove_batches(run.model, cells, batch_key="batch", label_key="label")
    assert corrected.shape == cells.shape
    assert list(corrected.obs_names) == list(cells.obs_names)

    def spread(z: np.ndarray, obs: Any) -> float:
        """Mean distance of a label's batches from each other."""
        parts = []
        for value in store.schema.labels[0].values:
            of = [z[((obs["label"] == value) & (obs["batch"] == b)).to_numpy()].mean(0) for b in known]
            parts.append(np.linalg.norm(of[0] - of[1]))
        return float(np.mean(parts))

    before = np.asarray(run.model.get_latent_representation(cells))
    assert spread(corrected.obsm[CORRECTED], corrected.obs) < 0.5 * spread(before, cells.obs)

    mapped = map_corrected(run.model, corrected, query, batch_key="batch", label_key="label")
    assert mapped.n_obs == query.n_obs
    assert set(mapped.obs[REFERENCE]) == {new}
    theirs = np.asarray(run.model.get_latent_representation(query))
    for value in store.schema.labels[0].values:
        here = (query.obs["label"] == value).to_numpy()
        anchor = corrected.obsm[CORRECTED][(corrected.obs["label"] == value).to_numpy()].mean(0)
        moved, unmoved = (np.linalg.norm(z[here].mean(0) - anchor) for z in (mapped.obsm[CORRECTED], theirs))
        assert moved < unmoved
    both = map_corrected(run.model, corrected, query, batch_key="batch", label_key="label", anchor="largest")
    assert both.n_obs == corrected.n_obs + query.n_obs
    with pytest.raises(CategoryError, match="corrected reference"):
        map_corrected(run.model, query[:, :5].copy(), query, batch_key="batch", label_key="label")


def test_cells_without_a_label_are_decoded_where_they_are(store: Store, run: TrainedRun) -> None:
    cells = store.to_anndata()
    without = np.arange(cells.n_obs) % 4 == 0
    cells.obs["label"] = cells.obs["label"].astype(str).where(~without)
    corrected = remove_batches(run.model, cells, batch_key="batch", label_key="label")
    decoded = run.model.output("expression", cells).to_numpy()
    np.testing.assert_allclose(corrected.X[without], decoded[without], rtol=1e-5, atol=1e-6)
    assert not np.allclose(corrected.X[~without], decoded[~without], rtol=1e-2, atol=1e-2)


def test_a_smaller_reference_is_moved_onto_the_query(store: Store, run: TrainedRun) -> None:
    *known, new = store.schema.batch.values
    keys: dict[str, Any] = {"batch_key": "batch", "label_key": "label"}
    query, model = store.to_anndata([new]), run.model.model
    corrected = remove_batches(run.model, store.to_anndata(known)[:60].copy(), **keys)
    both = map_corrected(run.model, corrected, query, anchor="largest", **keys)
    assert (both.obs[REFERENCE] == "reference").tolist() == [True] * 60 + [False] * query.n_obs
    np.testing.assert_allclose(  # the query is the largest: its cells stay
        both.X[60:], run.model.output("expression", query), rtol=1e-5, atol=1e-6
    )
    theirs = np.asarray(run.model.get_latent_representation(query))
    with torch.no_grad():
        ours = model.encode(torch.as_tensor(corrected.X))[0].numpy()  # type: ignore[operator]
        for value in store.schema.labels[0].values:
            here = (corrected.obs["label"] == value).to_numpy()
            shift = theirs[(query.obs["label"] == value).to_numpy()].mean(0) - ours[here].mean(0)
            moved = model.decode(torch.as_tensor(ours[here] + shift)).numpy()  # type: ignore[operator]
            np.testing.assert_allclose(both.X[:60][here], moved, rtol=1e-4, atol=1e-5)


def test_corrections_and_responses_are_written_without_holding_them(
    store: Store, run: TrainedRun, tmp_path: Path
) -> None:
    """Two passes over the store, in batches; the folder holds what the AnnData would."""
    *known, new = store.schema.batch.values
    keys: dict[str, Any] = {"batch_key": "batch", "label_key": "label"}
    told: list[tuple[int, int]] = []
    out = remove_batches(
        run.model, store, **keys, batch_size=300, out=tmp_path / "c.zarr", progress=lambda *at: told.append(at)
    )
    assert len(told) == 3
    assert told[-1] == (800, 800)
    assert problems(out) == []
    in_memory, on_disk = remove_batches(run.model, store, **keys), ad.read_zarr(out)
    assert list(on_disk.obs_names) == list(in_memory.obs_names)
    assert list(on_disk.var_names) == list(in_memory.var_names)
    np.testing.assert_allclose(on_disk.X, in_memory.X, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(on_disk.obsm[CORRECTED], in_memory.obsm[CORRECTED], rtol=1e-4, atol=1e-4)
    _same_obs(on_disk, in_memory)

    query = store.to_anndata([new])
    ours = map_corrected(run.model, in_memory, query, **keys)
    theirs = map_corrected(run.model, out, query, **keys, out=tmp_path / "q.zarr")
    np.testing.assert_allclose(ad.read_zarr(theirs).X, ours.X, rtol=1e-4, atol=1e-5)
    _same_obs(ad.read_zarr(theirs), ours)
    with pytest.raises(UsageError, match="AnnData"):
        map_corrected(run.model, out, query, **keys, anchor="largest")
    with pytest.raises(CategoryError, match="corrected"):
        map_corrected(run.model, theirs, query, **keys, reference_label_key="zz")
    with pytest.raises(StorageError, match="exists"):
        remove_batches(run.model, store, **keys, out=out)

    settings: dict[str, Any] = {"condition_key": "batch", "control": known[0], "stimulated": new, "label_key": "label"}
    table, _ = predict_response(run.model, store, target=query, **settings)
    path, _ = predict_response(run.model, store, target=query, **settings, out=tmp_path / "r.zarr", batch_size=100)
    np.testing.assert_allclose(ad.read_zarr(path).X, table, rtol=1e-4, atol=1e-4)


def _same_obs(one: ad.AnnData, other: ad.AnnData) -> None:
    assert list(one.obs.columns) == list(other.obs.columns)
    for name in one.obs.columns:
        assert list(one.obs[name].astype(str)) == list(other.obs[name].astype(str))


@pytest.mark.parametrize("train_decoder", [False, True])
def test_map_encodes_a_query_and_trains_nothing(
    store: Store, run: TrainedRun, tmp_path: Path, train_decoder: bool
) -> None:
    cells = store.to_anndata([store.schema.batch.values[0]])
    cells.obs["batch"] = "new"
    cells.write_h5ad(tmp_path / "donor.h5ad")
    model, donor = Path(run.path) / "model", tmp_path / "donor.h5ad"
    settings: dict[str, Any] = {"report": {"picture": "pca"}, "surgery": {"train_decoder": train_decoder}}
    result = map_queries(model, donor, tmp_path / "out", batch_key="batch", **settings)
    (record,) = result.queries
    assert record["state"] == "done", record["reason"]
    told = " ".join(record["warnings"])
    assert "trains nothing" in told
    assert "decoder" not in told  # it has no rows of a batch either
    assert ad.read_h5ad(tmp_path / "out" / "donor.h5ad").obsm["X_scGen"].shape == (cells.n_obs, 6)
