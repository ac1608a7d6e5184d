import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import BusyError, DataChangedError, NonFiniteError, UsageError
from scarcade.engine.folder import problems
from scarcade.jobs.run_folder import RunFolder
from scarcade.jobs.train import TrainedRun, train
from scarcade.jobs.train_config import resolved
from scarcade.jobs.trained import load
from tests.s3 import s3_server

SMALL: dict[str, Any] = {
    "model": {"n_hidden": 8, "n_latent": 4},
    "optim": {"log_every": 2},
    "scale": {"threads": 1},
    "data": {"batch_size": 64},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return simulate(tmp_path_factory.mktemp("train") / "a.zarr", cells=500, genes=50, batches=2, labels=3, seed=2)


def trained(store: Store, out: Path, said: list[Mapping[str, Any]] | None = None, **more: Any) -> TrainedRun:
    options = {"settings": SMALL, "epochs": 2, **more}
    return train(store, out=out, progress=(said if said is not None else []).append, **options)


def test_a_run_leaves_a_model_its_latent_and_its_metrics(store: Store, tmp_path: Path) -> None:
    said: list[Mapping[str, Any]] = []
    run = trained(store, tmp_path / "run", said)
    assert run.stopped == "epochs"
    assert [line["epoch"] for line in run.history] == [0, 1]
    assert problems(tmp_path / "run" / "model") == []
    assert (tmp_path / "run" / "model" / "latent.zarr").is_dir()
    latent = run.model.get_latent_representation(store)
    assert np.shape(latent) == (500, 4)
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = {"time", "step", "epoch", "cells", "cells_per_s", "wait", "train/loss"}
    assert all(wanted <= set(line) for line in lines)
    notes = " ".join(str(message.get("note")) for message in said)
    assert "the KL weight reaches 0.0025 of 1 in 2 epochs" in notes
    assert "--recipe scarches" in notes  # surgery cannot move the cells of this one


def test_the_same_command_again_says_that_it_is_done(store: Store, tmp_path: Path) -> None:
    first = trained(store, tmp_path / "run")
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    said: list[Mapping[str, Any]] = []
    again = trained(store, tmp_path / "run", said)
    assert "is trained already (2 epochs)" in str(said[-1]["note"])
    assert again.history == first.history
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


def test_more_epochs_continue_to_the_weights_of_a_longer_run(store: Store, tmp_path: Path) -> None:
    trained(store, tmp_path / "part")
    trained(store, tmp_path / "part", epochs=4)
    trained(store, tmp_path / "whole", epochs=4)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("part", "whole")]
    assert weights[0] == weights[1]


def test_what_the_error_of_a_record_advises_can_be_done_in_the_same_folder(store: Store, tmp_path: Path) -> None:
    """Replayed steps have the bits of others, so a run may go on without them."""
    trained(store, tmp_path / "run", epochs=1)
    optim = {**SMALL["optim"], "record": False}
    trained(store, tmp_path / "run", epochs=2, settings={**SMALL, "optim": optim})
    trained(store, tmp_path / "whole", epochs=2)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def test_other_settings_are_refused_and_named(store: Store, tmp_path: Path) -> None:
    trained(store, tmp_path / "run")
    with pytest.raises(UsageError, match=r"--optim\.lr was 0\.001, now 0\.01"):
        trained(store, tmp_path / "run", settings={**SMALL, "optim": {"lr": 0.01}})
    with pytest.raises(UsageError, match=r"--optim\.epochs was 2, now 1"):
        trained(store, tmp_path / "run", epochs=1)
    with pytest.raises(UsageError, match=r"--seed was 0, now 3"):
        trained(store, tmp_path / "run", seed=3)
    trained(store, tmp_path / "run", settings={**SMALL, "scale": {"threads": 2}})  # how fast is free


def test_what_the_error_of_a_loss_advises_can_be_done_in_the_same_folder(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"lower --optim\.lr"):
        trained(store, tmp_path / "run", settings={**SMALL, "optim": {"lr": 1e30}})
    trained(store, tmp_path / "run")
    trained(store, tmp_path / "whole")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("slow", [False, True])
def test_bfloat16_without_units_for_it_is_told(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool
) -> None:
    monkeypatch.setattr("scarcade.jobs.train.slow_in_bfloat16", lambda: slow)
    said: list[Mapping[str, Any]] = []
    trained(store, tmp_path / "run", said, settings={**SMALL, "optim": {"products": "bfloat16"}}, epochs=1)
    assert any("no units for bfloat16" in str(message) for message in said) == slow


def test_how_labelled_cells_are_dealt_is_refused_by_a_model_that_reads_none(store: Store) -> None:
    with pytest.raises(UsageError, match=r"--data\.samples-per-label 9: scvi learns nothing from labels"):
        resolved({"data": {"samples_per_label": 9}}, store=store)


def test_a_run_of_an_older_version_goes_on_without_the_settings_that_it_did_not_know(
    store: Store, tmp_path: Path
) -> None:
    trained(store, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("stratify")))
    assert config.read_text() != "".join(lines)
    with pytest.raises(UsageError, match=r"--data\.stratify was False, now True"):
        trained(store, tmp_path / "run", settings={**SMALL, "data": {**SMALL["data"], "stratify": True}})
    trained(store, tmp_path / "run")
    assert "stratify = false" in config.read_text()


def test_a_run_keeps_its_lanes_whatever_the_number_of_workers(store: Store, tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "run").lanes() is None
    trained(store, tmp_path / "run", settings={**SMALL, "data": {"batch_size": 64, "lanes": 16}})
    assert RunFolder(tmp_path / "run").lanes() == 16
    trained(store, tmp_path / "run", epochs=3)  # for so few workers a new run has 8


def test_other_data_are_refused_in_a_finished_run_and_in_one_that_is_not(store: Store, tmp_path: Path) -> None:
    trained(store, tmp_path / "run")
    other = simulate(tmp_path / "b.zarr", cells=500, genes=50, batches=2, labels=3, seed=3)
    with pytest.raises(DataChangedError, match="was trained on other data"):
        trained(other, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(DataChangedError, match="began with other data"):
        trained(other, tmp_path / "run")


def test_a_run_that_is_being_worked_on_is_busy(store: Store, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked(), pytest.raises(BusyError, match=f"process {os.getpid()} on "):
        trained(store, tmp_path / "run")
    trained(store, tmp_path / "run")


def test_a_folder_that_is_no_run_is_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"not a run \(it holds thesis\.txt\)"):
        trained(store, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "scvy"}, r"--model scvy: there is no such model; there are scvi"),
        ({"recipe": "soup"}, r"--recipe soup"),
        ({"settings": {"model": {"n_hiden": 3}}}, r"--model\.n-hiden: there is no such setting"),
        ({"settings": {"optim.lr": -1}}, r"--optim\.lr: .*greater than 0"),
        ({"batch_key": "donor"}, r"--batch-key donor: the store was made with --batch-key batch"),
        ({"label_key": "type"}, r"--label-key type: the first label column of the store is label"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(
    store: Store, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        trained(store, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_recipe_goes_before_defaults_and_settings_before_a_recipe(store: Store) -> None:
    config = resolved({"model": {"n_layers": 3}}, recipe="scarches", store=store)
    assert (config.model["n_layers"], config.model["use_layer_norm"]) == (3, "both")
    assert config.optim.epochs == 400
    assert config.data.lanes == 8
    assert resolved({"scale": {"workers": 9}}, store=store).data.lanes == 16


@pytest.mark.long
def test_a_run_begun_on_one_number_of_threads_and_another_hash_seed_has_the_same_bits(
    store: Store, tmp_path: Path
) -> None:
    trained(store, tmp_path / "here")
    code = (
        "import json, sys; from scarcade.jobs.train import train; "
        "train(sys.argv[1], out=sys.argv[2], epochs=2, settings=json.loads(sys.argv[3]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run(
        [sys.executable, "-c", code, str(store.path), str(tmp_path / "there"), json.dumps(SMALL)],
        check=True,
        env=environment,
        capture_output=True,
    )
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("here", "there")]
    assert weights[0] == weights[1]


def test_the_latent_beside_the_model_is_that_of_the_model(store: Store, tmp_path: Path) -> None:
    import anndata

    run = trained(store, tmp_path / "run")
    stored = anndata.read_zarr(tmp_path / "run" / "model" / "latent.zarr")
    np.testing.assert_allclose(stored.obsm["X_scVI"], run.model.get_latent_representation(store), rtol=1e-4, atol=1e-5)


def test_a_run_lives_in_an_object_store_as_on_a_disk(store: Store, tmp_path: Path) -> None:
    trained(store, tmp_path / "disk", epochs=3)
    with s3_server() as url:
        out = url("runs/a")
        options: dict[str, Any] = {"settings": SMALL, "progress": lambda _: None}
        first = train(store, out=out, epochs=2, **options)
        assert len(first.history) == 2
        said: list[Mapping[str, Any]] = []
        train(store, out=out, epochs=2, settings=SMALL, progress=said.append)
        assert "is trained already" in str(said[-1]["note"])
        longer = train(store, out=out, epochs=3, **options)
        assert len(longer.history) == 3
        weights = longer.model.model.state_dict()
    disk = load(tmp_path / "disk" / "model").model.state_dict()
    assert all(bool((weights[name] == disk[name]).all()) for name in disk)


def test_products_in_bfloat16_are_an_option_that_a_run_keeps(tmp_path: Path) -> None:
    store = simulate(tmp_path / "a.zarr", cells=600, genes=700, batches=2, labels=3, seed=2)
    settings = {"optim": {"products": "bfloat16"}, "scale": {"threads": 1}}
    whole = train(store, out=tmp_path / "whole", epochs=3, settings={"scale": {"threads": 1}})
    rounded = train(store, out=tmp_path / "rounded", epochs=3, settings=settings)
    values = [run.history[-1]["validation/elbo"] for run in (whole, rounded)]
    assert values[0] != values[1]
    assert abs(values[1] - values[0]) < 0.005 * abs(values[0])
    with pytest.raises(UsageError, match=r"--optim.products was bfloat16, now float32"):
        train(store, out=tmp_path / "rounded", epochs=3)
    # a run of an older version, whose file does not tell it, was one in float32
    config = tmp_path / "whole" / "config.toml"
    config.write_text(config.read_text().replace('products = "float32"\n', ""))
    assert train(store, out=tmp_path / "whole", epochs=3).stopped == "epochs"
    with pytest.raises(UsageError, match=r"--optim.products was float32, now bfloat16"):
        train(store, out=tmp_path / "whole", epochs=3, settings=settings)
