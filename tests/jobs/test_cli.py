"""The command line: what it takes, what it refuses, and how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scarcade import jobs
from scarcade.jobs import entry
from scarcade.jobs.cli import main
from scarcade.jobs.exits import STOPPED
from tests.jobs.conftest import Atlas


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ended(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command line."""
    capsys.readouterr()
    code = main([str(part) for part in argv])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    """The one message of a command that must fail with `code`."""
    found, out, err = ended(capsys, *argv)
    assert found == code, err
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    return errors[0]


def test_help_waits_for_nothing_heavy() -> None:
    heavy = ("torch", "ray", "anndata", "numpy", "pandas", "zarr", "sklearn", "matplotlib", "jinja2")
    code = (
        "import sys; from scarcade.jobs.cli import main; assert main(['--help']) == 0; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("simulate", "ingest", "train", "map", "embed", "score", "inspect", "demo"):
        assert command in done.stdout


def test_help_lists_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ended(capsys, "train", "--help")
    assert code == 0
    assert "--optim.lr float" in out
    assert "Learning rate of Adam. (default: 0.001)" in out
    assert "--model.n-latent int" in out
    code, out, _ = ended(capsys, "map", "--help")
    assert "--transfer.k int" in out
    assert "(default: 200)" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, "--version")[:2] == (0, "0.1.0\n")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["trian"], 'Did you mean "train"'),
        (["train", "--data", "a.zarr"], "--out"),
        (["train", "--data", "a.zarr", "--out", "r", "--epochs", "many"], "--epochs"),
        (["train", "--data", "a.zarr", "--out", "r", "--epoch", "3"], "Did you mean --epochs"),
        (["train", "--data", "a.zarr", "--out", "r", "--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["train", "--data", "a.zarr", "--out", "r", "--optim.lr"], "--optim.lr: wants a value"),
        (["train", "--data", "a.zarr", "--out", "r", "--nonsense.x", "1"], "its sections are"),
        (["train", "--data", "a.zarr", "--out", "r", "--epochs", "3", "--optim.epochs", "3"], "one setting"),
        (["train", "--data", "a.zarr", "--out", "r", "--optim.lr", "1", "--optim.lr", "2"], "given twice"),
        (["train", "--data", "a.zarr", "--out", "r", "--model", "vae"], "there are scvi"),
        (["train", "--data", "a.zarr", "--out", "r", "--config"], "--config: wants a TOML file"),
        (["train", "--data", "a.zarr", "--out", "r", "--config", "none.toml"], "none.toml: cannot be read"),
        (["train", "scvi", "--data", "a.zarr", "--out", "r"], "train does not take 'scvi': see scarcade train --help"),
        (["score", "l.zarr"], "--labels"),
        (["score", "l.zarr", "--optim.lr", "1"], "--optim.lr"),
        (["simulate", "x.zarr", "--cells", "0"], "--cells 0"),
        (["ingest", "a.h5ad", "--out", "a.zarr", "--workers", "-1"], "--workers -1: wanted are 0"),
        (["embed", "m", "a.h5ad", "--out", "l.zarr", "--batch-size", "0"], "--batch-size 0: wanted are 1 or more"),
        (["embed", "m", "a.h5ad", "--out", "l.zarr", "--batch-size", "-5"], "--batch-size -5: wanted are 1 or more"),
        (["embed", "m", "a.h5ad", "--out", "l.zarr", "--samples", "-1"], "--samples -1: wanted are 0"),
        (["embed", "m", "a.h5ad", "--out", "l.zarr", "--threads", "0"], "--threads 0: wanted are 1 or more"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_remedy(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, 2, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--log", "foo"], "--log.to: Input should be 'tensorboard'"),
        (["--optim.kl-epochs", "x"], "--optim.kl-epochs: Input should be a valid number"),
        (["--optim.kl_epochs", "x"], "--optim.kl-epochs: Input should be a valid number"),
    ],
)
def test_options_are_named_as_they_are_written(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    assert told in refused(capsys, 2, "train", "--data", atlas.store.path, "--out", tmp_path / "run", *options)


def test_map_helps_with_what_it_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas) -> None:
    shown = ended(capsys, "map", "--help")[1]
    for one in ("--scale.gpus", "--data.gpu-memory", "--data.edit-labels", "--optim.products", "--optim.record"):
        assert one not in shown
    assert "--data.stream-above" in shown
    assert "--data.gpu-memory" in ended(capsys, "train", "--help")[1]
    for option in (["--scale.gpus"], ["--data.gpu-memory", "0"]):
        told = refused(capsys, 2, "map", atlas.model, atlas.query, "--out", tmp_path / "m", *option)
        assert f"{option[0]}: queries are mapped on processors so far" in told


def test_the_out_of_a_mapping_is_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas) -> None:
    (tmp_path / "m").write_text("mine")
    told = refused(capsys, 2, "map", atlas.model, atlas.query, "--out", tmp_path / "m")
    assert "is a file, and a folder was wanted" in told
    told = refused(
        capsys, 5, "map", atlas.model, atlas.query, "--out", tmp_path / "o", "--merge", tmp_path / "m/x.zarr"
    )
    assert "--merge" in told
    assert "is no folder that takes new files" in told
    assert not (tmp_path / "o").exists()


def test_columns_that_a_file_does_not_have_are_refused(capsys: pytest.CaptureFixture[str], atlas: Atlas) -> None:
    for option in ("--batch-key", "--label-key"):
        told = refused(capsys, 4, "inspect", atlas.query, option, "WRONG")
        assert f"has no obs column 'WRONG' ({option}); it has" in told
    assert ended(capsys, "inspect", atlas.query, "--batch-key", "batch")[0] == 0


def test_a_run_that_goes_on_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas) -> None:
    command = ("train", "--data", atlas.store.path, "--out", tmp_path / "run", "--threads", 1, "--epochs")
    assert "continuing" not in ended(capsys, *command, 1)[2]
    assert "continuing from the checkpoint of step " in ended(capsys, *command, 2)[2]


def test_what_should_be_known_of_queries_is_told_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    for name in ("a", "b"):
        shutil.copy(atlas.query, tmp_path / f"{name}.h5ad")
    more = ("--out", tmp_path / "m", "--epochs", 1, "--transfer.k", 100_000)
    code, _, told = ended(capsys, "map", atlas.model, tmp_path / "a.h5ad", tmp_path / "b.h5ad", *more)
    assert code == 0
    assert told.count("note: --transfer.k 100000: all of the ") == 1
    summary = json.loads((tmp_path / "m" / "summary.json").read_text())
    assert all("--transfer.k 100000" in str(query["warnings"]) for query in summary["queries"])


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("epoch = 3", "did you mean epochs?"),
        ("[optim]\nlrr = 3", "did you mean --optim.lr?"),
        ("epochs = 'many'", "[epochs] from"),
        ("epochs = 3\n[optim]\nepochs = 4", "one setting"),
        ("epochs = ", "not valid TOML"),
        ("[optim]\nlr = 'fast'", "--optim.lr"),
        ("debug = true", "debug"),
    ],
)
def test_a_wrong_toml_file_ends_with_2(
    toml: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    config = tmp_path / "train.toml"
    config.write_text(toml)
    store = atlas.store.path
    message = refused(capsys, 2, "train", "--data", store, "--out", tmp_path / "run", "--config", config)
    assert told in message
    assert not (tmp_path / "run" / "model").exists()


def test_toml_gives_options_and_the_command_line_wins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    config = tmp_path / "map.toml"
    config.write_text(
        f"queries = ['{atlas.query}']\nbatch_key = 'batch'\nepochs = 9\n"
        "[optim]\nlr = 0.01\n[report]\npicture = 'pca'\n[transfer]\nk = 7\n"
    )
    out = tmp_path / "out"
    code, _, err = ended(capsys, "map", atlas.model, "--out", out, "--config", config, "--optim.epochs", 2)
    assert code == 0, err
    settings = json.loads(ad.read_h5ad(out / "donor.h5ad").uns["scarcade"]["mapping"])["settings"]
    assert settings["optim"]["epochs"] == 2
    assert settings["optim"]["lr"] == 0.01
    assert settings["transfer"]["k"] == 7
    assert len(json.loads((out / ".records" / "donor.json").read_text())["history"]) == 2


def test_the_commands_in_a_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """simulate -> train -> embed -> score -> inspect -> map, as a new user types them."""
    store, run = tmp_path / "a.zarr", tmp_path / "run"
    made = ("--cells", 600, "--genes", 80, "--batches", 2, "--labels", 3)
    assert ended(capsys, "simulate", store, *made)[0] == 0
    assert "--force" in refused(capsys, 2, "simulate", store)
    trained = ("--data", store, "--out", run, "--recipe", "scarches", "--epochs", 2, "--model.n-latent", 5)
    code, out, err = ended(capsys, "train", *trained)
    assert code == 0, err
    assert out == f"{run}/model\n"
    assert (run / "model" / "latent.zarr").is_dir()
    code, out, err = ended(capsys, "embed", run / "model", store, "--out", tmp_path / "l.zarr")
    assert code == 0, err
    latent = ad.read_zarr(tmp_path / "l.zarr")
    assert latent.obsm["X_scVI"].shape == (600, 5)
    code, out, err = ended(
        capsys, "score", tmp_path / "l.zarr", "--labels", "label", "--batches", "batch", "--json", "--max-cells", 300
    )
    assert code == 0, err
    assert {"silhouette_label", "ilisi", "kbet", "nmi", "total"} <= set(json.loads(out))
    code, out, err = ended(capsys, "inspect", run / "model", "--json")
    assert code == 0, err
    assert json.loads(out)["kind"] == "model"


def test_force_takes_away_results_and_nothing_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    query = mine / "q.h5ad"
    query.write_bytes(atlas.query.read_bytes())
    embed = ("embed", atlas.model, query, "--batch-key", "batch", "--force", "--out")
    for command in (
        ("ingest", query, "--batch-key", "batch", "--force", "--out", mine),
        ("simulate", mine, "--cells", 100, "--genes", 20, "--force"),
        (*embed, mine),
        ("embed", atlas.model, atlas.store.path, "--force", "--out", atlas.store.path),
        ("embed", atlas.model, atlas.store.path, "--out", atlas.store.path / "latent"),
        ("embed", atlas.model, atlas.store.path, "--force", "--out", atlas.model),
    ):
        assert "choose another --out" in refused(capsys, 2, *command)
    assert sorted(path.name for path in mine.iterdir()) == ["notes.txt", "q.h5ad"]
    for start in (("simulate",), ("ingest", query, "--out")):
        assert "ends in .zarr" in refused(capsys, 2, *start, tmp_path / "new.h5ad")
    made = ("simulate", tmp_path / "a.zarr", "--cells", 100, "--genes", 20, "--batches", 1)
    assert ended(capsys, *made)[0] == 0
    assert ended(capsys, *made, "--force")[0] == 0


def test_a_query_that_cannot_be_used_ends_with_4(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    bad = tmp_path / "bad.h5ad"
    bad.write_bytes(atlas.query.read_bytes()[:5000])
    out = tmp_path / "out"
    code, _, err = ended(capsys, "map", atlas.model, bad, "--out", out, "--report.picture", "pca")
    assert code == 4
    assert err.splitlines()[-1].startswith("error: 1 of 1 queries could not be mapped: bad: ")
    assert "truncated" in err
    code, printed, err = ended(
        capsys, "map", atlas.model, bad, atlas.query, "--out", out, "--epochs", 1, "--report.picture", "pca"
    )
    assert code == 3
    assert "error: 1 of 2 queries" in err
    assert "done" in printed
    assert not list(out.glob("bad*"))


@pytest.mark.parametrize("what", ["nothing", "a file", "a folder"])
def test_what_is_no_model_ends_with_4(
    what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    model = tmp_path / "model"
    if what == "a file":
        model.write_text("no model")
    elif what == "a folder":
        model.mkdir()
    message = refused(capsys, 4, "map", model, atlas.query, "--out", tmp_path / "out")
    assert str(model) in message
    assert not (tmp_path / "out").exists()


def test_an_unknown_batch_key_names_the_columns_there_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    code, _, err = ended(capsys, "map", atlas.model, atlas.query, "--out", tmp_path / "o", "--batch-key", "donor")
    assert code == 4
    assert "--batch-key" in err
    assert "true_label" in err


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = ended(capsys, "inspect", tmp_path / "none", "--debug")
    assert code == 4
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_a_folder_that_cannot_be_written_ends_with_5(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refused(capsys, 5, "map", atlas.model, atlas.query, "--out", tmp_path / "file" / "out")
    assert "--out" in message


def test_an_interrupt_while_the_command_is_imported_ends_tidily(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "scarcade.jobs.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "scarcade.jobs.cli")
    monkeypatch.delattr(jobs, "cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert entry.main() == 130
    assert capsys.readouterr().err == f"error: {STOPPED}\n"


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_tidily(number: signal.Signals, code: int, tmp_path: Path, atlas: Atlas) -> None:
    command = [sys.executable, "-u", "-m", "scarcade.jobs.cli", "map", str(atlas.model), str(atlas.query)]
    command += ["--out", str(tmp_path / "out"), "--epochs", "100000", "--report.picture", "pca"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "mapping" in line
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.splitlines()[-1].startswith("error: stopped")
    assert "Traceback" not in err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [query["state"] for query in summary["queries"]] == ["skipped"]


def test_a_reader_that_went_away_is_no_error() -> None:
    command = f"{sys.executable} -m scarcade.jobs.cli map --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_embedding_unknown_batches_points_to_map(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas
) -> None:
    message = refused(
        capsys, 4, "embed", atlas.model, atlas.query, "--out", tmp_path / "l.zarr", "--batch-key", "batch"
    )
    assert "scarcade map" in message
    assert not (tmp_path / "l.zarr").exists()


def test_scores_of_a_mapped_query(capsys: pytest.CaptureFixture[str], tmp_path: Path, atlas: Atlas) -> None:
    rng = np.random.default_rng(0)
    cells = ad.AnnData(np.ones((60, 2), np.float32), obsm={"X_scVI": rng.normal(size=(60, 4)).astype(np.float32)})
    cells.obs["label"], cells.obs["label_pred"] = ["a", "b"] * 30, ["a", "a"] * 30
    cells.write_h5ad(tmp_path / "q.h5ad")
    code, out, err = ended(
        capsys, "score", tmp_path / "q.h5ad", "--labels", "label", "--predicted", "label_pred", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["accuracy"] == 0.5
    assert "it has X_scVI" in refused(capsys, 2, "score", tmp_path / "q.h5ad", "--labels", "label", "--obsm", "X_no")
    assert "'no'" in refused(capsys, 4, "score", tmp_path / "q.h5ad", "--labels", "no")
