"""Scores from files of every kind."""

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scarcade.dataloaders.schema import DataWarning
from scarcade.engine.errors import CategoryError, CorruptError, OpenError, UsageError
from scarcade.engine.folder import committed
from scarcade.engine.scores import integration
from scarcade.jobs import merged, written
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.score import score
from tests.jobs.conftest import Atlas


def cells() -> ad.AnnData:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    latent = rng.normal(size=(200, 4)) + 6 * labels[:, None]
    found = ad.AnnData(np.ones((200, 2), np.float32), obsm={"X_scVI": latent, "X_pca": latent[:, :2]})
    found.obs["label"] = [f"type {code}" for code in labels]
    found.obs["batch"] = [f"b{i % 2}" for i in range(200)]
    found.obs["guess"] = found.obs["label"].where(np.arange(200) % 4 > 0, "type 0")
    return found


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
def test_a_file_a_store_and_an_object_score_alike(tmp_path: Path) -> None:
    made = cells()
    made.write_h5ad(tmp_path / "a.h5ad")
    with ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        made.write_zarr(tmp_path / "a.zarr")
    wanted = integration(
        made.obsm["X_scVI"], made.obs["label"].astype("category").cat.codes.to_numpy(), np.arange(200) % 2
    )
    for source in (made, tmp_path / "a.h5ad", tmp_path / "a.zarr"):
        assert score(source, labels="label", batches="batch") == wanted


def test_predictions_are_compared() -> None:
    made = cells()
    scores = score(made, labels="label", predicted="guess")
    assert scores["accuracy"] == pytest.approx((made.obs["label"] == made.obs["guess"]).mean())
    unlabelled = score(made, labels="label", predicted="guess", unlabelled=["type 1", "type 2"], obsm="X_pca")
    assert unlabelled["accuracy"] == 1.0


def test_what_reads_like_no_label_is_pointed_out() -> None:
    made = cells()
    made.obs.loc[made.obs_names[:50], "label"] = "Unknown"
    with pytest.warns(DataWarning, match=r"50 cells are scored as cells of label 'Unknown'.*--unlabelled 'Unknown'"):
        score(made, labels="label")
    score(made, labels="label", unlabelled=["Unknown"])  # warnings are errors


def test_what_a_mapping_took_for_no_label_is_none_here(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)
    labels = cells.obs["label"].astype(str)
    cells.obs["label"] = labels.where(np.arange(len(labels)) % 3 > 0, "not known")
    map_queries(atlas.model, {"q": cells}, tmp_path, epochs=1, unlabelled=("not known",))
    file = tmp_path / "q.h5ad"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(file, labels="label", predicted="label_pred")
    told = score(file, labels="label", predicted="label_pred", unlabelled=["not known"])
    assert found == told
    plain = ad.read_h5ad(file)
    del plain.uns["scarcade"]
    assert score(plain, labels="label", predicted="label_pred")["accuracy"] < found["accuracy"]


def test_the_latent_of_a_model_scores(atlas: Atlas) -> None:
    scores = score(atlas.model / "latent.zarr", labels="label", batches="batch")
    assert scores["n_cells"] == 2_000 - ad.read_h5ad(atlas.query).n_obs
    assert scores["label_score"] > 0.3


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
@pytest.mark.parametrize("kind", [merged.KIND, written.KIND])
def test_what_a_mapping_wrote_as_zarr_scores_if_it_is_whole(kind: str, tmp_path: Path) -> None:
    made = cells()
    version_3 = ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False)
    with version_3, committed(tmp_path / "a.zarr", extra={"kind": kind}) as work:
        made.write_zarr(work)
    assert score(tmp_path / "a.zarr", labels="label") == score(made, labels="label")
    next(path for path in (tmp_path / "a.zarr" / "obsm").glob("X_scVI/c/*/*")).write_bytes(b"")
    with pytest.raises(CorruptError, match=r"a\.zarr: obsm/.*0 bytes where"):
        score(tmp_path / "a.zarr", labels="label")


def test_folders_of_ours_without_a_latent_say_what_can_be_scored(atlas: Atlas) -> None:
    with pytest.raises(OpenError, match=r"is a model; .* is .*model.latent\.zarr$"):
        score(atlas.model, labels="label")
    with pytest.raises(OpenError, match="is a store; what can be scored"):
        score(atlas.store.path, labels="label")


def test_cells_without_a_latent_say_so() -> None:
    made = cells()
    del made.obsm
    with pytest.raises(OpenError, match="no latent to score"):
        score(made, labels="label")


def test_what_cannot_be_scored_is_told(tmp_path: Path) -> None:
    made = cells()
    with pytest.raises(UsageError, match="--labels, --batches"):
        score(made)
    with pytest.raises(UsageError, match="--predicted"):
        score(made, batches="batch", predicted="guess")
    with pytest.raises(CategoryError, match="'no'"):
        score(made, labels="no")
    with pytest.raises(UsageError, match="it has X_scVI, X_pca"):
        score(made, labels="label", obsm="X_no")
    made.obsm["X_other"] = made.obsm["X_scVI"]
    with pytest.raises(UsageError, match="--obsm"):
        score(made, labels="label")
    with pytest.raises(OpenError):
        score(tmp_path / "none.h5ad", labels="label")
    with pytest.raises(UsageError, match="--max-cells"):
        score(made, labels="label", max_cells=3)
