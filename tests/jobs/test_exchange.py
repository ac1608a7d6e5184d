from pathlib import Path

import pytest
import torch

from scarcade.engine.errors import OpenError, StorageError
from scarcade.jobs.exchange import import_model
from scarcade.models.interop.scarches import read_scarches
from scarcade.models.interop.scvi_tools import read_scvi_tools
from scarcade.models.saved import read
from tests.models.cells import made_batch
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


@pytest.mark.parametrize(("name", "kind"), [("trVAE_zinb_mmd", "trvae"), ("expiMap", "expimap")])
def test_models_of_scarches_become_folders_of_ours(name: str, kind: str, tmp_path: Path) -> None:
    path = shared(f"parity/{name}/ref_model")
    model, again = read_scarches(path), read(import_model(path, tmp_path / "model"))
    cells = made_batch(model.schema, 8)
    assert again.name == kind
    assert torch.equal(model.embed(cells)[0], again.embed(cells)[0])
