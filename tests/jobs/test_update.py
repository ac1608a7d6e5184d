"""Updating a reference: the old cells stay where they were, the new ones come to them, again and again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.errors import CategoryError, DataChangedError, GenesError, UsageError
from scarcade.engine.folder import problems
from scarcade.jobs.cells import cells_of
from scarcade.jobs.cli import main
from scarcade.jobs.inspect import inspect
from scarcade.jobs.latent import read_latent
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.train import train
from scarcade.jobs.trained import load
from scarcade.jobs.update import Weights, training_defaults, update_of
from scarcade.models import Scanvi, Scvi, Totalvi
from scarcade.models.layers import BatchNorm
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read, save
from scarcade.models.surgery import SurgeryConfig, reference_hash, trainable
from tests.every_model import EVERY, made_store, recipe_of, settings_of, trained_models

pytestmark = pytest.mark.filterwarnings("ignore::scarcade.dataloaders.schema.DataWarning")
QUICK: dict[str, Any] = {"optim": {"lr": 0.01, "eps": 0.01}, "data": {"batch_size": 64}, "scale": {"threads": 1}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(tmp_path_factory.mktemp("update") / "a.zarr")


@pytest.fixture(scope="module")
def references(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return trained_models(store, tmp_path_factory.mktemp("models"))


def new_cells(store: Store, batch: str, n: int = 90) -> ad.AnnData:
    cells = ad.read_h5ad(store.path.with_suffix(".h5ad"))[:n].copy()
    cells.obs["batch"] = batch
    cells.obs["label"] = cells.obs["label"].astype(object)
    cells.obs_names = [f"{batch}_{i}" for i in range(n)]
    return cells


def new_store(cells: ad.AnnData, path: Path) -> Store:
    cells.write_h5ad(path.with_suffix(".h5ad"))
    protein = "proteins" if "proteins" in cells.obsm else None
    return ingest(
        path.with_suffix(".h5ad"), path, batch_key="batch", label_keys=["label"], protein_key=protein,
        report=lambda _: None,
    )  # fmt: skip


def updated(store: Store, reference: Path, out: Path, said: list[str] | None = None, **more: Any) -> Path:
    def tell(message: Mapping[str, Any]) -> None:
        if said is not None and "note" in message:
            said.append(str(message["note"]))

    train(store, out=out, update=reference, progress=tell, **{"settings": QUICK, "epochs": 2, **more})
    return out / "model"


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_two_updates_by_surgery_leave_the_old_cells_and_bring_the_new(
    name: str, store: Store, references: Callable[[str], Path], tmp_path: Path
) -> None:
    reference = references(name)
    first = new_cells(store, "new1")[:, ::-1].copy()  # genes in another order
    first.var_names = [f"{gene}.7" for gene in first.var_names]
    second = new_cells(store, "new2", 60)[:, 5:].copy()  # some genes were not measured
    before = read_latent(reference / "latent.zarr")
    one = updated(new_store(first, tmp_path / "1.zarr"), reference, tmp_path / "one")
    two = updated(new_store(second, tmp_path / "2.zarr"), one, tmp_path / "two")

    was, now = read(reference), read(two)
    assert now.schema.genes == was.schema.genes
    assert now.schema.batch.values == (*was.schema.batch.values, "new1", "new2")
    latent = read_latent(two / "latent.zarr")
    assert len(latent) == 300 + 90 + 60
    np.testing.assert_array_equal(latent.mean[:300], before.mean)
    codes = [latent.columns[0][1][a:b] for a, b in ((0, 300), (300, 390), (390, 450))]
    np.testing.assert_array_equal(codes[0], before.columns[0][1])
    assert [set(part) for part in codes[1:]] == [{3}, {4}]
    # and what was kept is what the new model says of the old cells
    again = load(two).get_latent_representation(store)
    np.testing.assert_allclose(again, before.mean, atol=1e-5)
    embedded = load(two).get_latent_representation(first, batch_key="batch")
    np.testing.assert_allclose(_by_name(latent.mean[300:390], tmp_path / "1.zarr", first), embedded, atol=1e-5)

    assert problems(two) == []
    assert now.record is not None
    lineage = now.record["lineage"]
    assert [one["fingerprint"] for one in lineage] == [was.fingerprint, read(one).fingerprint]
    assert [one["data_fingerprint"] for one in lineage] == [
        store.fingerprint,
        open_store(tmp_path / "1.zarr").fingerprint,
    ]
    assert [one["new"] for one in lineage] == [{"batch": ["new1"]}, {"batch": ["new2"]}]
    assert now.record["parent"] == lineage[-1]["fingerprint"]
    query = new_cells(store, "query", 30)
    (record,) = map_queries(two, query, tmp_path / "mapped", batch_key="batch", epochs=1).queries
    assert record["state"] == "done", record["reason"]


def _by_name(latent: np.ndarray, path: Path, cells: ad.AnnData) -> np.ndarray:
    """Rows of a store's latent in the order of the file."""
    places = {name: place for place, name in enumerate(open_store(path).names(0, len(latent)))}
    return latent[[places[name] for name in cells.obs_names]]


@pytest.mark.parametrize("name", EVERY)
def test_an_update_of_all_weights_moves_them_and_leaves_the_old_latents_out(
    name: str, store: Store, references: Callable[[str], Path], tmp_path: Path
) -> None:
    said: list[str] = []
    data = new_store(new_cells(store, "new"), tmp_path / "new.zarr")
    out = updated(data, references(name), tmp_path / "run", said, update_weights="all")
    assert any("no longer right" in note for note in said)
    was, now = read(references(name)), read(out)
    weights, old = dict(now.named_parameters()), dict(was.named_parameters())
    assert any(not np.array_equal(weights[n].detach(), old[n].detach()) for n in old if n.startswith("encoder"))
    latent = read_latent(out / "latent.zarr")
    assert len(latent) == 90
    np.testing.assert_allclose(latent.mean, load(out).get_latent_representation(data), atol=1e-5)
    assert now.record is not None
    assert now.record["lineage"][0]["update"] == "all"


def test_all_weights_train_as_in_training_and_rows_alone_as_in_a_mapping(store: Store, tmp_path: Path) -> None:
    """Of a reference with batch norm, whose statistics surgery leaves alone."""
    save(Scvi(Scvi.Config(n_hidden=8, n_latent=3), store.schema), tmp_path / "m", training={}, data_fingerprint=None)
    data = new_store(new_cells(store, "new"), tmp_path / "new.zarr")

    def norms(weights: Weights) -> tuple[AtlasModel, set[float]]:
        grown = update_of(tmp_path / "m", data, weights=weights, min_genes=0.8).grown(SurgeryConfig(), 0)
        return grown, {one.momentum for one in grown.modules() if isinstance(one, BatchNorm)}

    everything, rows = norms("all"), norms("surgery")
    assert everything[1] == {BatchNorm.MOMENTUM}
    assert rows[1] == {0.0}
    assert (everything[0].query_mode, rows[0].query_mode) == (None, "eval")
    assert all(p.requires_grad for p in everything[0].parameters())
    assert {name.rsplit(".")[-1] for name in trainable(rows[0])} == {"new"}


def test_defaults_of_an_update_are_those_of_what_trains(store: Store) -> None:
    totalvi = Totalvi(Totalvi.Config(n_hidden=8), store.schema)
    (everything,) = training_defaults(totalvi, "all", 1000)
    assert everything["optim"]["kl_steps"] == 750
    rows, own = training_defaults(totalvi, "surgery", 1000)
    assert rows["optim"] == {"epochs": 200, "weight_decay": 0.0}
    assert own["optim"]["kl_epochs"] == 192
    scanvi = Scanvi(Scanvi.Config(n_hidden=8), store.schema)
    assert training_defaults(scanvi, "all", 1000)[0]["optim"]["epochs"] == 10  # its weights are trained already


def test_surgery_moves_no_weight_of_the_reference(
    store: Store, references: Callable[[str], Path], tmp_path: Path
) -> None:
    reference = references("scvi")
    data = new_store(new_cells(store, "new"), tmp_path / "new.zarr")
    out = updated(data, reference, tmp_path / "run")
    old, new = read(reference).state_dict(), read(out).state_dict()
    assert all(np.array_equal(new[name][: len(tensor)], tensor) for name, tensor in old.items())
    assert any(len(new[name]) > len(tensor) for name, tensor in old.items())


@pytest.mark.long
@pytest.mark.parametrize("name", EVERY)
def test_a_reference_of_one_batch_can_be_updated(name: str, store: Store, tmp_path: Path) -> None:
    made = new_store(new_cells(store, "only"), tmp_path / "one.zarr")
    settings = settings_of(name, made.schema)
    train(made, name, out=tmp_path / "one", recipe=recipe_of(name), settings=settings, progress=lambda _: None)
    data = new_store(new_cells(store, "new"), tmp_path / "new.zarr")
    out = updated(data, tmp_path / "one" / "model", tmp_path / "two")
    assert read(out).schema.batch.values == ("only", "new")
    before, after = (read_latent(path / "latent.zarr") for path in (tmp_path / "one" / "model", out))
    np.testing.assert_array_equal(after.mean[:90], before.mean)
    np.testing.assert_allclose(load(out).get_latent_representation(made), before.mean, atol=1e-5)


def test_new_labels_are_added_but_where_weights_belong_to_them(
    store: Store, references: Callable[[str], Path], tmp_path: Path
) -> None:
    cells = new_cells(store, "new")
    cells.obs.loc[cells.obs_names[:20], "label"] = "newcomer"
    data = new_store(cells, tmp_path / "new.zarr")
    out = updated(data, references("scvi"), tmp_path / "scvi")
    known = read(references("scvi")).schema.labels[0].values
    assert read(out).schema.labels[0].values == (*known, "newcomer")
    column = read_latent(out / "latent.zarr").column("label")
    assert column is not None
    assert (column[1] == len(known)).sum() == 20
    with pytest.raises(CategoryError, match=r"'newcomer'.*--unlabelled"):
        updated(data, references("scanvi"), tmp_path / "scanvi")
    assert not (tmp_path / "scanvi" / "model").exists()


def test_what_meant_no_label_to_the_reference_means_none_in_new_data(store: Store, tmp_path: Path) -> None:
    cells = new_cells(store, "old")
    cells.obs.loc[cells.obs_names[:20], "label"] = "unlabelled"
    none = [int((cells.obs["label"].isna() | (cells.obs["label"] == "unlabelled")).sum())]
    cells.write_h5ad(tmp_path / "old.h5ad")
    told: list[str] = []
    old = ingest(
        tmp_path / "old.h5ad", tmp_path / "old.zarr", batch_key="batch", label_keys=["label"],
        unlabelled=["unlabelled"], report=told.append,
    )  # fmt: skip
    train(old, out=tmp_path / "reference", settings=QUICK, epochs=1, progress=lambda _: None)
    cells.obs["batch"] = "new"
    cells.obs["label"] = cells.obs["label"].astype(object)  # writing made categories of it
    cells.obs.loc[cells.obs_names[20:30], "label"] = "newcomer"
    none.append(int((cells.obs["label"].isna() | (cells.obs["label"] == "unlabelled")).sum()))
    data = new_store(cells, tmp_path / "new.zarr")
    assert "unlabelled" in data.schema.labels[0].values  # it was not told
    said: list[str] = []
    out = updated(data, tmp_path / "reference" / "model", tmp_path / "updated", said)
    labels = read(out).schema.labels[0].values
    assert labels[-1] == "newcomer"
    assert "unlabelled" not in labels
    column = read_latent(out / "latent.zarr").column("label")
    assert column is not None
    assert (column[1] < 0).sum() == sum(none)
    assert "new in 'label': 'newcomer'" in said
    assert not [line for line in said if "does not know" in line]
    assert not cells_of(tmp_path / "old.h5ad", read(out)).notes


def test_what_cannot_be_updated_is_refused(store: Store, references: Callable[[str], Path], tmp_path: Path) -> None:
    cells = new_cells(store, "new")
    data = new_store(cells, tmp_path / "new.zarr")
    reference = references("scvi")
    few = new_store(cells[:, :20].copy(), tmp_path / "few.zarr")
    for arguments, error, said in (
        ({"model": "scanvi"}, UsageError, "is scvi"),
        ({"recipe": "scarches"}, UsageError, "--recipe"),
        ({"init_from": reference}, UsageError, "--init-from"),
        ({"settings": {"model": {"n_latent": 7}}}, UsageError, "--model.n-latent 7"),
        ({"update_weights": "some"}, UsageError, "--update-weights: "),
        ({"settings": {"data": {"edit_labels": True}}}, UsageError, "--data.edit-labels"),
        (
            {"settings": {"data": {"samples_per_label": 9}}},
            UsageError,
            "--data.samples-per-label 9: scvi learns nothing",
        ),
        ({"settings": {"surgery": {"model": {"min_program_genes": 3}}}}, UsageError, "surgery.model.*scvi has none"),
        ({"settings": {"surgery": {"query_mode": "train"}}, "update_weights": "all"}, UsageError, "query-mode train"),
        (
            {"settings": {"surgery": {"train_decoder_norm": True}}, "update_weights": "all"},
            UsageError,
            "--surgery.train-decoder-norm True: is for --update-weights surgery",
        ),
    ):
        with pytest.raises(error, match=said):
            updated(data, reference, tmp_path / "run", **arguments)
    with pytest.raises(GenesError, match=r"20 of the model's 60 genes.*min_genes"):
        updated(few, reference, tmp_path / "run")
    assert updated(few, reference, tmp_path / "run", min_genes=0.3).is_dir()
    with pytest.raises(UsageError, match="--update MODEL"):
        train(store, out=tmp_path / "other", update_weights="all")


def test_the_driver_reads_the_reference_once_and_the_worker_again(
    store: Store, references: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def counting(path: Any) -> Any:
        reads.append(str(path))
        return read(path)

    for module in ("train", "train_config", "train_work", "update"):
        monkeypatch.setattr(f"scarcade.jobs.{module}.read", counting)
    reference = references("scvi")
    updated(new_store(new_cells(store, "new"), tmp_path / "new.zarr"), reference, tmp_path / "run", epochs=1)
    assert reads == [str(reference)] * 2


def test_the_same_command_again_is_done_and_another_reference_is_not(
    store: Store, references: Callable[[str], Path], tmp_path: Path
) -> None:
    data = new_store(new_cells(store, "new"), tmp_path / "new.zarr")
    out = updated(data, references("scvi"), tmp_path / "run")
    weights = (out / "model.safetensors").read_bytes()
    said: list[str] = []
    updated(data, references("scvi"), tmp_path / "run", said)
    assert "is trained already" in said[-1]
    assert (out / "model.safetensors").read_bytes() == weights
    more = updated(data, references("scvi"), tmp_path / "run", epochs=4)
    whole = updated(data, references("scvi"), tmp_path / "whole", epochs=4)
    assert (more / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="--update was"):
        updated(data, out, tmp_path / "run")
    train(store, out=tmp_path / "plain", settings=settings_of("scvi", store.schema), progress=lambda _: None)
    moved = tmp_path / "moved"
    moved.symlink_to(references("scvi"))
    updated(data, moved, tmp_path / "linked")
    moved.unlink()
    moved.symlink_to(tmp_path / "plain" / "model")
    with pytest.raises((DataChangedError, UsageError)):
        updated(data, moved, tmp_path / "linked")


def test_known_batches_alone_train_nothing(store: Store, references: Callable[[str], Path], tmp_path: Path) -> None:
    cells = new_cells(store, str(store.schema.batch.values[0]))
    said: list[str] = []
    out = updated(new_store(cells, tmp_path / "known.zarr"), references("scvi"), tmp_path / "run", said)
    assert any("nothing trains" in note for note in said)
    assert reference_hash(read(out)) == reference_hash(read(references("scvi")))
    assert len(read_latent(out / "latent.zarr")) == 390


def test_the_command_and_what_inspect_says(
    store: Store, references: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = new_store(new_cells(store, "new"), tmp_path / "new.zarr")
    line = ["train", "--data", str(data.path), "--update", str(references("trvae")), "--out", str(tmp_path / "run")]
    line += ["--epochs", "1", "--model.n-latent", "3", "--threads", "1"]
    assert main(line) == 0, capsys.readouterr().err
    capsys.readouterr()
    found = inspect(tmp_path / "run" / "model")
    assert found["intact"]
    assert found["lineage"][0]["update"] == "surgery"
    assert main(["inspect", str(tmp_path / "run" / "model")]) == 0
    shown = capsys.readouterr().out
    assert "lineage:" in shown
    assert str(found["lineage"][0]["fingerprint"]) in shown
    assert "## Lineage" in (tmp_path / "run" / "model" / "README.md").read_text()
    raw = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert raw["training"]["config"]["update_weights"] == "surgery"
    # the run's own configuration is its command
    assert main([*line[:1], "--config", str(tmp_path / "run" / "config.toml"), *line[1:3], *line[5:7]]) == 0
    assert "already" in capsys.readouterr().err
