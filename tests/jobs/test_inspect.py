import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.store import open_store
from scarcade.engine.errors import OpenError
from scarcade.engine.folder import committed, write_json
from scarcade.engine.schema import Categories, Schema
from scarcade.jobs.inspect import inspect, render
from tests.dataloaders.files import adata, quiet, written


def model(path: Path, genes: tuple[str, ...]) -> Path:
    schema = Schema(genes, Categories("batch", ("b0",)), (Categories("cell_type", ("B", "T")),))
    with committed(path, extra={"kind": "model", "fingerprint": "f" * 64}) as work:
        write_json(work / "model.json", {"model": "scvi", "config": {"n_latent": 5}, "schema": schema.to_dict()})
        (work / "model.safetensors").write_bytes(b"\0" * 100)
    return path


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
def test_a_file_of_cells(tmp_path: Path, name: str) -> None:
    data = adata()
    info = inspect(written(data, tmp_path / name))
    assert (info["kind"], info["intact"], info["problems"]) == (name.split(".")[1], True, [])
    assert (info["n_cells"], info["n_genes"], info["counts_from"]) == (60, 20, "X")
    assert info["stored_values"] == data.X.nnz
    assert json.loads(json.dumps(info)) == info
    assert "cell_type: 4 values" in render(info)
    assert f"stored values: {data.X.nnz}" in render(info)


def test_a_file_with_a_bad_value_is_not_intact_and_one_without_counts_is(tmp_path: Path) -> None:
    data = adata(5000, 20)
    data.X.data[-70_000 % data.X.nnz] = 0.5
    info = inspect(written(data, tmp_path / "a.h5ad"), layer="X")
    assert not info["intact"]
    assert "E_COUNTS" in info["problems"][0]
    data.X = np.log1p(data.X.toarray())
    info = inspect(written(data, tmp_path / "log.h5ad"))
    assert info["intact"]
    assert info["counts_from"] is None
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "a.h5ad").read_bytes()[:30_000])
    info = inspect(tmp_path / "cut.h5ad")
    assert not info["intact"]
    assert "truncated" in info["problems"][0]


def test_a_store_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = ingest(
            written(adata(), tmp_path / "a.h5ad"),
            tmp_path / "s.zarr",
            batch_key="batch",
            label_keys=["cell_type"],
            report=quiet,
        )
    info = inspect(store.path)
    assert (info["kind"], info["intact"], info["n_cells"]) == ("store", True, 60)
    assert info["labels"] == {"cell_type": ["B", "T", "unknown"]}
    assert info["sources"][0]["name"] == "a.h5ad"
    assert "sources:" in render(info)
    chunk = next(p for p in (store.path / "X" / "data").rglob("*") if p.is_file() and p.name != "zarr.json")
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    info = inspect(store.path)
    assert (info["intact"], len(info["problems"])) == (False, 1)
    assert "X/data" in info["problems"][0]


def test_a_search(tmp_path: Path) -> None:
    search = tmp_path / "search"
    for name, state in (("trial-0000", "done"), ("trial-0001", "stopped"), ("trial-0002", "done")):
        (search / "trials" / name).mkdir(parents=True)
        (search / "trials" / name / "trial.json").write_text(json.dumps({"state": state}))
    (search / "config.toml").write_text("trials = 3\n")
    info = inspect(search)
    assert (info["kind"], info["finished"], info["intact"]) == ("run", False, True)
    assert info["trials"] == {"done": 2, "stopped": 1}
    (search / "best.toml").write_text("")
    (search / "trials" / "trial-0001" / "trial.json").write_text("{")
    info = inspect(search)
    assert (info["finished"], info["best"], info["intact"]) == (True, str(search / "best.toml"), False)
    assert "trial-0001" in info["problems"][0]


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").write_bytes(b"x")
    with pytest.raises(OpenError, match=r"a\.h5ad: is a file and not a store; `scarcade ingest`"):
        open_store(tmp_path / "a.h5ad")


def test_a_model_a_run_and_a_query_against_them(tmp_path: Path) -> None:
    data = adata()
    path = written(data, tmp_path / "a.h5ad")
    run = tmp_path / "run"
    model(run / "model", tuple(data.var_names))
    (run / "config.toml").write_text("seed = 3\n")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    info = inspect(run)
    assert (info["kind"], info["finished"], info["intact"]) == ("run", True, True)
    assert (info["config"], info["last_metrics"]) == ({"seed": 3}, {"step": 2})
    info = inspect(run / "model")
    assert (info["kind"], info["model"], info["n_genes"], info["batches"]) == ("model", "scvi", 20, ["b0"])
    for folder in (run, run / "model"):
        info = inspect(path, folder, batch_key="batch")
        assert (info["mappable"], info["genes_found"], info["new_batches"]) == (True, 20, ["shared"])
    far = model(tmp_path / "far", tuple(f"ENSG{i:011d}" for i in range(9)))
    info = inspect(path, far)
    assert not info["mappable"]
    assert "wanted are Ensembl ids" in info["reasons"][0]
    assert "can be mapped: no" in render(info)
    (run / "model" / "model.safetensors").write_bytes(b"\1" * 100)
    assert inspect(run)["problems"] == ["model/model.safetensors: its content is not what was written"]


def test_a_delta_shows_what_it_has(tmp_path: Path) -> None:
    record = {"model": "scvi", "parent": "f" * 64, "batch": {"name": "batch", "values": ["b0", "new"]}}
    with committed(tmp_path / "q.delta", extra={"kind": "delta", "fingerprint": "e" * 64}) as work:
        write_json(work / "delta.json", record)
    info = inspect(tmp_path / "q.delta")
    assert (info["kind"], info["batch_key"], info["batches"]) == ("delta", "batch", ["b0", "new"])
    assert not {"n_genes", "labels", "proteins", "latent"} & info.keys()
    assert not [line for line in render(info).splitlines() if line.endswith((":", ": 0"))]


def test_what_is_nothing_of_ours(tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("hello")
    assert not inspect(tmp_path / "text.h5ad")["intact"]
    with pytest.raises(OpenError, match="no such file"):
        inspect(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenError, match="is no store, model, run"):
        inspect(tmp_path / "empty")
    with pytest.raises(OpenError, match="is no model"):
        inspect(written(adata(), tmp_path / "a.h5ad"), tmp_path)


def test_looking_at_cells_does_not_wait_for_torch(tmp_path: Path) -> None:
    path = written(adata(), tmp_path / "a.h5ad")
    code = (
        "import sys; from scarcade.jobs.inspect import inspect; inspect(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
