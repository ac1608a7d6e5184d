import shutil
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scarcade.engine.errors import OpenError, StorageError
from scarcade.engine.folder import problems
from scarcade.jobs.cli import main
from scarcade.jobs.exchange import export_model, import_model
from scarcade.models import MODELS
from scarcade.models.interop.scvi_tools import read_scvi_tools
from scarcade.models.saved import read, save
from scarcade.models.scvi import Scvi
from scarcade.models.trvae import Trvae
from tests.every_model import EVERY, settings_of
from tests.models.cells import made_batch, made_schema
from tests.shared import shared


def test_the_pancreas_reference_becomes_a_folder_of_ours(tmp_path: Path) -> None:
    path = shared("data/checkpoints/archmap_scVI_pancreas")
    model, again = read_scvi_tools(path), read(import_model(path, tmp_path / "model"))
    cells = made_batch(model.schema, 8)
    assert torch.equal(model.embed(cells)[0], again.embed(cells)[0])
    assert again.record is not None
    assert again.record["training"] == {"imported_from": "scvi-tools", "version": "0.16.1", "model": "SCVI"}
    with pytest.raises(StorageError, match="exists"):
        import_model(path, tmp_path / "model")


def test_nothing_is_written_where_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(OpenError):
        import_model(tmp_path / "nothing", tmp_path / "model")
    assert not (tmp_path / "model").exists()


FOREIGN = {
    "SCVI_default": "scvi",
    "SCVI_covs_genebatch": "scvi",
    "SCANVI": "scanvi",
    "TOTALVI": "totalvi",
    "trVAE_nb": "trvae",
    "trVAE_zinb_mmd": "trvae",
    "expiMap": "expimap",
    "scGen": "scgen",
}


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), FOREIGN.items())
def test_a_model_is_imported_and_mapped_onto_by_commands(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = shared(f"parity/{name}/ref_model"), tmp_path / "model"
    assert main(["import", str(path), "--out", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    model = read(folder)
    assert model.name == kind
    cells = made_batch(model.schema, 30)
    query = ad.AnnData(
        cells.counts.dense(torch.device("cpu")).numpy(), obs=pd.DataFrame(index=list(map(str, range(30))))
    )
    query.var_names = list(model.schema.genes)
    for column in model.schema.categorical:
        query.obs[column.name] = column.values[0]
    for number in model.schema.continuous:
        query.obs[number] = 0.5
    query.write_h5ad(tmp_path / "donor.h5ad")
    out = tmp_path / "out"
    argv = ["map", folder, tmp_path / "donor.h5ad", "--out", out, "--epochs", 2, "--threads", 1]
    assert main([str(part) for part in argv]) == 0
    latent = ad.read_h5ad(out / "donor.h5ad").obsm[model.obsm_key]
    assert latent.shape == (30, model.n_latent)
    assert np.isfinite(latent).all()


@pytest.mark.long
@pytest.mark.parametrize("name", ["trVAE_nb", "expiMap", "scGen"])
def test_a_folder_of_scarches_that_is_broken_is_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "theirs"

    def told(file: str, content: bytes | None) -> str:
        """What is said of the folder with other bytes in a file, or without it."""
        shutil.copytree(shared(f"parity/{name}/ref_model"), folder, dirs_exist_ok=True)
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        assert main(["import", str(folder), "--out", str(tmp_path / "ours")]) == 4
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "ours").exists()
        assert not (tmp_path / "hacked").exists()
        return line

    evil = f"\x80\x04cposix\nsystem\n(S'touch {tmp_path / 'hacked'}'\ntR.".encode("latin1")
    names = (shared(f"parity/{name}/ref_model") / "var_names.csv").read_bytes()
    assert "wanted one model.pt, or attr.pkl with model_params.pt and var_names.csv" in told("attr.pkl", None)
    assert "names posix.system" in told("attr.pkl", evil)
    assert "names posix.system" in told("model_params.pt", evil)
    assert "not text, so not a list of genes" in told("var_names.csv", evil)
    assert "expected" in told("var_names.csv", b"\n".join(names.split(b"\n")[:40]))


def test_what_is_no_foreign_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Scvi(Scvi.Config(n_hidden=4), made_schema(5)), tmp_path / "ours", training={}, data_fingerprint=None)
    for path, told in {"ours": "is a model of scarcade already", "nowhere": "no such file or folder"}.items():
        assert main(["import", str(tmp_path / path), "--out", str(tmp_path / "out")]) == 4
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", EVERY)
def test_a_model_of_ours_is_exported_and_imported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = made_schema(60, batches="abc", labels="xyz")
    schema = replace(schema, proteins=tuple("pqrs")) if name == "totalvi" else schema
    settings = settings_of(name, schema)["model"]
    if name == "expimap":
        settings = {"programs": settings["programs"], "hidden_layer_sizes": [8]}
    model = MODELS[name](MODELS[name].Config.model_validate(settings), schema, seed=3)
    ours, theirs, again = tmp_path / "ours", tmp_path / "theirs", tmp_path / "again"
    save(model, ours, training={}, data_fingerprint=None)
    assert main(["export", str(ours), "--out", str(theirs)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{theirs}\n"
    tool = "scvi-tools" if isinstance(model, Scvi) else "scArches"
    assert told.err.splitlines()[0] == f"{name if name == 'scgen' else name.upper()} of {tool}"
    assert not problems(theirs)
    assert main(["inspect", str(theirs)]) == 4
    assert "`scarcade import` reads it" in capsys.readouterr().err
    assert main(["import", str(theirs), "--out", str(again)]) == 0
    cells = made_batch(schema, 20)
    if name == "scgen":  # its files know one batch
        cells = replace(cells, batch=torch.zeros_like(cells.batch))
    assert torch.equal(read(again).embed(cells)[0], read(ours).embed(cells)[0])


def test_an_export_takes_the_place_of_an_export_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, out = tmp_path / "ours", tmp_path / "out"
    save(Scvi(Scvi.Config(n_hidden=4), made_schema(5)), ours, training={}, data_fingerprint=None)
    command = ["export", str(ours), "--out", str(out)]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(command) == 2
    assert main([*command, "--force"]) == 2
    assert "was not made by scarcade" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
    shutil.rmtree(out)
    assert main(command) == 0
    assert main(command) == 2
    assert main([*command, "--force"]) == 0
    assert main(["export", str(ours), "--out", str(ours), "--force"]) == 2
    assert read(ours).name == "scvi"


def test_what_cannot_be_exported_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    config = Trvae.Config(hidden_layer_sizes=(4,), n_latent=2, normalise_input=True)
    save(Trvae(config, made_schema(5, batches="ab")), tmp_path / "ours", training={}, data_fingerprint=None)
    for path, told in {
        "ours": "cannot be exported: the encoder sees normalised counts (normalise_input)",
        "nowhere": "nowhere",
    }.items():
        assert main(["export", str(tmp_path / path), "--out", out]) == 4
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert told in line
    assert sorted(one.name for one in tmp_path.iterdir()) == ["ours"]


def test_a_model_at_a_url_is_exported_to_a_url(tmp_path: Path) -> None:
    save(Scvi(Scvi.Config(n_hidden=4), made_schema(5)), tmp_path / "ours", training={}, data_fingerprint=None)
    done = export_model((tmp_path / "ours").as_uri(), (tmp_path / "theirs").as_uri())
    assert (done.tool, done.name, done.path) == ("scvi-tools", "SCVI", (tmp_path / "theirs").as_uri())
    assert read_scvi_tools(tmp_path / "theirs").schema.genes == made_schema(5).genes
