"""What the models cannot use, through the commands: an exit code, and one line that says what to change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import pytest

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.synthetic import simulate
from scarcade.jobs.cli import main
from tests.every_model import EVERY, made_query, made_store, trained_models

QUICK = ("--epochs", "1", "--threads", "1")
Change = Callable[[ad.AnnData], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that every model can train on, and some that lack something."""
    folder = tmp_path_factory.mktemp("wrong")
    made_store(folder / "a.zarr")
    simulate(folder / "plain.zarr", cells=100, genes=60, batches=2, labels=2, seed=1)
    cells = ad.read_h5ad(folder / "a.h5ad")
    cells.obs["one"], cells.obs["none"] = "B cell", "unknown"
    cells.write_h5ad(folder / "cells.h5ad")
    for name, label in (("unlabelled", "none"), ("one class", "one")):
        ingest(
            folder / "cells.h5ad",
            folder / f"{name}.zarr",
            batch_key="batch",
            label_keys=[label],
            unlabelled=["unknown"],
            report=lambda _: None,
        )
    ingest(folder / "cells.h5ad", folder / "one batch.zarr", batch_key="one", report=lambda _: None)
    genes = list(cells.var_names)
    (folder / "small.gmt").write_text("a\tna\t" + "\t".join(genes[:5]))
    (folder / "strangers.gmt").write_text("a\tna\t" + "\t".join(f"GENE{i}" for i in range(20)))
    (folder / "binary.gmt").write_bytes(bytes(range(256)))
    (folder / "empty.gmt").write_text("\n")
    (folder / "list.gmt").write_text("A\nB\n")
    return folder


@pytest.fixture(scope="module")
def models(folder: Path) -> Callable[[str], Path]:
    # behind unconstrained terms surgery cannot add programs
    return trained_models(open_store(folder / "a.zarr"), folder, {"expimap": {"n_ext": 0, "use_hsic": False}})


def ended(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, list[str]]:
    """(exit code, lines of stderr) of a command."""
    capsys.readouterr()
    code = main([str(part) for part in argv])
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return code, told.splitlines()


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    """The one message of a command that ends with `code`."""
    found, lines = ended(capsys, *argv)
    errors = [line for line in lines if line.startswith("error: ")]
    assert (found, len(errors)) == (code, 1), lines
    return errors[0]


@pytest.mark.parametrize(
    ("model", "store", "options", "code", "told"),
    [
        ("scanvi", "one batch", [], 2, "no label column (ingest with --label-key)"),
        ("scanvi", "unlabelled", [], 2, "no cell has one in 'none' (ingest with --label-key)"),
        ("totalvi", "plain", [], 2, "the data have none (ingest with --protein-key)"),
        ("expimap", "a", [], 2, "give --programs FILE.gmt"),
        (
            "expimap",
            "a",
            ["--programs", "small.gmt"],
            4,
            "1 too small; 5 of their 5 genes are in the data; wanted are ",
        ),
        ("expimap", "a", ["--programs", "strangers.gmt"], 4, "none of the 20 genes of 1 programs"),
        ("expimap", "plain", ["--programs", "small.gmt"], 4, "look like Ensembl ids"),
        ("expimap", "a", ["--programs", "binary.gmt"], 4, "not text"),
        ("expimap", "a", ["--programs", "empty.gmt"], 4, "holds no program"),
        ("expimap", "a", ["--programs", "list.gmt"], 4, "line 1 is not a program"),
        ("expimap", "a", ["--programs", "missing.gmt"], 4, "missing.gmt: cannot be read (No such file"),
        ("scvi", "a", ["--programs", "small.gmt"], 2, "--programs: scvi has no gene programs"),
        ("trvae", "a", ["--model.hidden-layer-sizes", "0"], 2, "greater than or equal to 1"),
        ("trvae", "a", ["--model.recon-loss", "poisson"], 2, "'nb', 'zinb' or 'mse'"),
    ],
)
def test_data_that_a_model_cannot_train_on(
    model: str,
    store: str,
    options: list[str],
    code: int,
    told: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    run = ["train", "--data", f"{store}.zarr", "--model", model, "--out", tmp_path / "run", *QUICK, *options]
    assert told in refused(capsys, code, *run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "store", "told"),
    [
        ("scanvi", "one class", "all labels in 'one' are 'B cell': the classifier has nothing to tell apart"),
        ("trvae", "one batch", "all cells are of one batch in 'one': the MMD has nothing to compare"),
    ],
)
def test_data_of_which_a_model_learns_little_are_pointed_out(
    model: str, store: str, told: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "--data", folder / f"{store}.zarr", "--model", model, "--out", tmp_path / "run", *QUICK]
    code, lines = ended(capsys, *run)
    assert code == 0
    assert told in "\n".join(lines)


def test_the_size_of_programs_is_an_option(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "--data", folder / "a.zarr", "--model", "expimap", "--out", tmp_path / "run", *QUICK]
    code, lines = ended(capsys, *run, "--programs", folder / "small.gmt", "--model.min-program-genes", "5")
    assert code == 0, lines


def panel(cells: ad.AnnData) -> None:
    cells.obsm["proteins"].columns = [f"other{i}" for i in range(12)]


def value(number: float) -> Change:
    def change(cells: ad.AnnData) -> None:
        cells.obsm["proteins"].iloc[3, 2] = number

    return change


def renamed(cells: ad.AnnData) -> None:
    cells.obsm["adt"] = cells.obsm.pop("proteins")


@pytest.mark.parametrize(
    ("change", "options", "code", "told"),
    [
        (panel, [], 4, "none of the model's proteins (protein00, "),
        (value(-1), [], 4, "(cell 'q3', protein 'protein02', -1.0); name the entry with raw counts by --protein-key"),
        (value(0.5), [], 4, "protein 'protein02', 0.5"),
        (value(float("inf")), [], 4, "protein 'protein02', inf"),
        (renamed, ["--protein-key", "proteins"], 4, "(--protein-key) is not there; obsm has adt"),
    ],
)
def test_proteins_that_cannot_be_used(
    change: Change,
    options: list[str],
    code: int,
    told: str,
    folder: Path,
    models: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = made_query(folder / "a.zarr")
    change(cells)
    cells.write_h5ad(tmp_path / "donor.h5ad")
    argv = [
        "map",
        models("totalvi"),
        tmp_path / "donor.h5ad",
        "--out",
        tmp_path / "out",
        "--batch-key",
        "batch",
        *QUICK,
    ]
    assert told in refused(capsys, code, *argv, *options)
    argv = ["ingest", tmp_path / "donor.h5ad", "--out", tmp_path / "b.zarr", "--protein-key", "proteins"]
    if change not in (panel, renamed):
        assert told in refused(capsys, code, *argv)


def test_proteins_matter_to_a_model_that_sees_them(folder: Path, models: Callable[[str], Path], tmp_path: Path) -> None:
    cells = made_query(folder / "a.zarr")
    renamed(cells)
    cells.write_h5ad(tmp_path / "donor.h5ad")
    warnings = {}
    for name in ("totalvi", "scvi"):
        out = tmp_path / name
        assert main([*map(str, ["map", models(name), tmp_path / "donor.h5ad", "--out", out]), *QUICK]) == 0
        warnings[name] = " ".join(json.loads((out / "summary.json").read_text())["queries"][0]["warnings"])
    assert "--protein-key names them, if they are one of obsm's adt" in warnings["totalvi"]
    assert "protein" not in warnings["scvi"]


@pytest.mark.parametrize(
    ("model", "options", "code", "told"),
    [
        ("scvi", ["--surgery.use-labels", "true"], 2, "--surgery.use-labels: scvi learns nothing from labels"),
        ("trvae", ["--surgery.model.n-ext", "2"], 2, "trvae adds nothing but rows of conditions"),
        ("expimap", ["--surgery.model.n-ext", "three"], 2, "--surgery.model.n-ext: Input should be a valid integer"),
        ("expimap", ["--surgery.model.alpha", "3"], 2, "--surgery.model.alpha: cannot be changed by surgery"),
        ("expimap", ["--surgery.model.new-programs", "missing.gmt"], 4, "new_programs missing.gmt: cannot be read"),
        ("expimap", ["--surgery.n-ext", "2"], 2, "--surgery.n-ext: `scarcade map` has no such setting"),
    ],
)
def test_surgery_that_a_model_cannot_have(
    model: str,
    options: list[str],
    code: int,
    told: str,
    folder: Path,
    models: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["map", models(model), folder / "cells.h5ad", "--out", tmp_path / "out", *QUICK, *options]
    assert told in refused(capsys, code, *argv)
    assert not (tmp_path / "out").exists()


def test_terms_are_added_by_options(
    folder: Path, models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["--surgery.model.new-programs", folder / "small.gmt", "--surgery.model.min-program-genes", "3"]
    more = ["--surgery.model.n-ext", "2", "--surgery.model.use-hsic", "--surgery.model.gamma-ext", "0.1"]
    argv = ["map", models("expimap"), folder / "cells.h5ad", "--out", tmp_path, *QUICK, *new, *more]
    assert ended(capsys, *argv)[0] == 0
    assert ad.read_h5ad(tmp_path / "cells.h5ad").obsm["X_expiMap"].shape[1] == 4 + 1 + 2


@pytest.mark.parametrize(
    ("model", "start", "code", "told"),
    [
        ("scanvi", "trvae", 2, "scanvi starts from a scvi or a scanvi model, and not from a trvae model"),
        ("scanvi", "totalvi", 2, "not from a totalvi model"),
        ("trvae", "scvi", 2, "trvae cannot start from scvi"),
        ("scanvi", "nothing", 4, "no such folder"),
    ],
)
def test_a_model_to_start_from_that_is_another(
    model: str,
    start: str,
    code: int,
    told: str,
    folder: Path,
    models: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begin = models(start) if start in EVERY else folder / start
    argv = ["train", "--data", folder / "a.zarr", "--model", model, "--out", tmp_path / "run", "--init-from", begin]
    assert told in refused(capsys, code, *argv, *QUICK)


def test_a_run_is_not_its_model(
    folder: Path, models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = models("scvi").parent
    told = refused(capsys, 4, "map", run, folder / "cells.h5ad", "--out", tmp_path / "out", *QUICK)
    assert told == f"error: {run}: is a run; its model is in {run / 'model'}"


@pytest.mark.parametrize("name", EVERY)
def test_a_damaged_model_maps_nothing(
    name: str, folder: Path, models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models(name), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    argv = ["map", tmp_path / "model", folder / "cells.h5ad", "--out", tmp_path / "out", *QUICK]
    assert "model.safetensors: its content is not what was written" in refused(capsys, 4, *argv)
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    (tmp_path / "model" / "model.json").write_text(json.dumps(record | {"model": "scvi"}))
    weights.unlink()
    assert "model.safetensors: missing; model.json: its content" in refused(capsys, 4, *argv)
    assert not (tmp_path / "out").exists()
