import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scarcade.engine.errors import OpenError, StorageError
from scarcade.jobs.cli import main
from scarcade.jobs.exchange import import_model
from scarcade.models.interop.scvi_tools import read_scvi_tools
from scarcade.models.saved import read, save
from scarcade.models.scvi import Scvi
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
