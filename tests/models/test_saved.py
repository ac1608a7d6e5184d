import json
import pickle  # noqa: TID251  (a hostile file is made here)
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scarcade.engine.errors import (
    CorruptError,
    ModelFileError,
    OpenError,
    ScarcadeError,
    StorageError,
    UnsafeFileError,
)
from scarcade.engine.folder import write_manifest
from scarcade.models import RECIPES, Scvi
from scarcade.models.saved import lineage_after, read, read_delta, save, save_delta
from scarcade.models.surgery import grow
from scarcade.models.weights import content_fingerprint, fingerprint, kind_of
from tests.engine.test_checkpoint import no_file_larger_than
from tests.models.cells import made_batch, made_schema
from tests.models.test_surgery import train, with_batches


def model_of(config: dict[str, Any] | None = None) -> Scvi:
    schema = made_schema(25, labels="uv", categorical=("xyz",), continuous=1)
    model = Scvi(Scvi.Config(**{"n_hidden": 12, "n_latent": 4, **(config or {})}), schema)
    model.observe([made_batch(schema)])
    return model.eval()


def saved(tmp_path: Path, model: Scvi | None = None) -> Path:
    save(model or model_of(), tmp_path / "model", training={"epochs": 3}, data_fingerprint="d" * 64)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "config",
    [
        {},
        RECIPES["scarches"],
        {"use_observed_lib_size": False, "dispersion": "gene-batch"},
        {"dispersion": "gene-label"},
    ],
)
def test_a_model_comes_back_as_it_was(tmp_path: Path, config: dict[str, Any]) -> None:
    model = model_of(config)
    again = read(saved(tmp_path, model))
    assert again.config == model.config
    assert again.schema == model.schema
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    cells = made_batch(model.schema)
    assert all(torch.equal(a, b) for a, b in zip(again.embed(cells), model.embed(cells), strict=True))
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    assert again.record is not None
    assert again.record["training"] == {"epochs": 3}


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert read(folder).fingerprint == fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(folder)
    save(model_of({"n_layers": 2}), tmp_path / "other", training={}, data_fingerprint=None)
    assert fingerprint(tmp_path / "other") != fingerprint(folder)
    assert (kind_of(folder), kind_of(tmp_path)) == ("model", None)


def test_no_file_is_a_program(tmp_path: Path) -> None:
    names = {p.name for p in saved(tmp_path).iterdir()}
    assert names == {"model.safetensors", "model.json", "MANIFEST.json", "README.md"}


def test_files_beside_the_model_stand_in_its_manifest(tmp_path: Path) -> None:
    def add(work: Path) -> None:
        (work / "latent.txt").write_text("1")

    save(
        model_of(),
        tmp_path / "m",
        training={},
        data_fingerprint=None,
        beside=add,
    )
    assert "latent.txt" in json.loads((tmp_path / "m" / "MANIFEST.json").read_text())["files"]
    (tmp_path / "m" / "latent.txt").write_text("2")  # not ours to judge here
    read(tmp_path / "m")


def test_a_full_disk_is_no_bug(tmp_path: Path) -> None:
    model = model_of()
    with no_file_larger_than(100), pytest.raises(StorageError, match="model: cannot be written"):
        saved(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    with pytest.raises(StorageError, match="exists"):
        save(model_of(), folder, training={}, data_fingerprint=None)
    save(model_of({"n_layers": 2}), folder, training={}, data_fingerprint=None, replace=True)
    assert read(folder).config.n_layers == 2


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove", "empty"])
def test_a_changed_file_is_found(tmp_path: Path, name: str, how: str) -> None:
    folder = saved(tmp_path)
    path = folder / name
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[:-7])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(CorruptError, match=name):
        read(folder)


def remade(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Changes JSON as someone who knows the format would: with a manifest that agrees."""
    (folder / name).write_text(json.dumps(content))
    resign(folder)


def resign(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    kind = kind_of(folder) or "model"
    write_manifest(folder, {"kind": kind, "fingerprint": content_fingerprint(folder, kind)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "update scarcade"),
        ({"format": 0}, "save it again"),
        ({"model": "nonsense"}, "known are scvi"),
        ({"surprise": 1}, "surprise"),
        ({"schema": {"genes": []}}, "schema"),
        ({"config": {"n_hidden": 13}}, "weight"),
        ({"config": {"n_layers": 2}}, "do not fit"),
        ({"config": {"n_hidden": 10**9}}, "n_hidden"),
        ({"config": {"n_latent": "many"}}, "n_latent"),
        ({"config": {"likelihood_path": "/tmp/x.so"}}, "likelihood_path"),
    ],
)
def test_json_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = saved(tmp_path)
    content = json.loads((folder / "model.json").read_text())
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) and key == "config" else value
    remade(folder, "model.json", content)
    with pytest.raises(ModelFileError, match=said):
        read(folder)


def test_a_schema_with_repeated_names_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    content = json.loads((folder / "model.json").read_text())
    content["schema"]["genes"][1] = "g0"
    remade(folder, "model.json", content)
    with pytest.raises(ModelFileError, match="genes are not unique"):
        read(folder)


@pytest.mark.parametrize("text", ["[]", "{", "\x00", "[" * 100_000])
def test_what_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path)
    (folder / "model.json").write_text(text)
    resign(folder)
    with pytest.raises(ModelFileError, match=r"model\.json"):
        read(folder)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["scale.bias"] = torch.full_like(tensors["scale.bias"], float("nan"))
    save_file(tensors, folder / "model.safetensors")
    resign(folder)
    with pytest.raises(ModelFileError, match="not finite"):
        read(folder)
    model = model_of()
    with torch.no_grad():
        model.scale.bias[0] = float("inf")
    with pytest.raises(ModelFileError, match="not finite"):
        save(model, tmp_path / "never", training={}, data_fingerprint=None)
    assert not (tmp_path / "never").exists()


def test_a_linked_file_counts_by_its_content(tmp_path: Path) -> None:
    """Hubs keep files under their hash and link to them."""
    folder = saved(tmp_path)
    (folder / "model.json").rename(tmp_path / "blob")
    (folder / "model.json").symlink_to("../blob")
    read(folder)
    (tmp_path / "blob").write_text("{}")
    with pytest.raises(CorruptError, match=r"model\.json"):
        read(folder)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["model.pt", "model.pkl", "x.ckpt"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    for path in (folder, folder / name):
        with pytest.raises(UnsafeFileError, match="import"):
            read(path)
    assert not (tmp_path / "marker").exists()


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="no such folder"):
        read(tmp_path / "nothing")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(OpenError, match="a file"):
        read(tmp_path / "file.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenError):
        read(tmp_path / "empty")


def test_a_delta_comes_back_on_its_reference(tmp_path: Path) -> None:
    reference = read(saved(tmp_path, model_of(RECIPES["scarches"])))
    grown = grow(reference, with_batches(reference.schema, "q"), seed=0)
    train(grown)
    assert reference.fingerprint is not None
    save_delta(grown, tmp_path / "q.delta", parent=reference.fingerprint, training={"epochs": 1})
    again = read_delta(tmp_path / "q.delta", reference)
    assert again.schema == grown.schema
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in grown.state_dict().items())
    assert sum(p.stat().st_size for p in (tmp_path / "q.delta").iterdir()) < 6000
    assert kind_of(tmp_path / "q.delta") == "delta"


def test_a_grown_model_can_be_saved_as_a_model(tmp_path: Path) -> None:
    reference = read(saved(tmp_path, model_of(RECIPES["scarches"])))
    grown = grow(reference, with_batches(reference.schema, "q"), seed=0)
    train(grown)
    lineage = lineage_after(reference, "surgery", {"batch": ["new"]})
    save(grown, tmp_path / "whole", training={}, data_fingerprint=None, lineage=lineage)
    whole = read(tmp_path / "whole")
    cells = made_batch(grown.schema, 30, first_batch=2)
    assert torch.equal(whole.embed(cells)[0], grown.embed(cells)[0])
    assert whole.record is not None
    assert whole.record["parent"] == reference.fingerprint
    assert [one["fingerprint"] for one in whole.record["lineage"]] == [reference.fingerprint]
    assert "| surgery | batch: new |" in (tmp_path / "whole" / "README.md").read_text()


def test_a_delta_of_another_reference_is_refused(tmp_path: Path) -> None:
    reference = read(saved(tmp_path, model_of(RECIPES["scarches"])))
    grown = grow(reference, with_batches(reference.schema, "q"), seed=0)
    save_delta(grown, tmp_path / "q.delta", parent="0" * 64, training={})
    with pytest.raises(ModelFileError, match="reference 0000"):
        read_delta(tmp_path / "q.delta", reference)
    with pytest.raises(ScarcadeError, match="not a model folder"):
        read(tmp_path / "q.delta")
    content = json.loads((tmp_path / "q.delta" / "delta.json").read_text())
    remade(tmp_path / "q.delta", "delta.json", {k: v for k, v in content.items() if k != "batch"})
    reference.fingerprint = "0" * 64
    with pytest.raises(ModelFileError, match=r"delta.json"):
        read_delta(tmp_path / "q.delta", reference)
