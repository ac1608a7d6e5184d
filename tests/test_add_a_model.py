"""The seventh model of docs/add-a-model.md, as it stands there: trained, mapped onto, updated, and asked."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

import scarcade as sca
from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.synthetic import simulate
from scarcade.jobs.cli import main
from scarcade.jobs.latent import read_latent
from scarcade.models import MODELS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add-a-model.md"
MODEL, REGISTRY, TESTS, USE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def ldvae(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, from a module of its own, with its line in the registry; both are gone after the test."""
    module = types.ModuleType("scarcade.models.ldvae")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(MODEL, "models/ldvae.py", "exec"), module.__dict__)
    monkeypatch.setitem(MODELS, "ldvae", None)  # taken out again by the fixture
    exec(compile(REGISTRY, "models/__init__.py", "exec"), {"Ldvae": module.__dict__["Ldvae"]})
    return module.__dict__["Ldvae"]


def test_its_own_tests_pass(ldvae: Any) -> None:
    names: dict[str, Any] = {"Ldvae": ldvae}
    exec(compile(TESTS, "tests/models/test_ldvae.py", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.long
def test_it_is_trained_mapped_onto_updated_and_asked(
    ldvae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = simulate("made.zarr", cells=1200, genes=80, batches=3, labels=3, seed=0, label_effect=2.0)
    *known, new = made.schema.batch.values
    made.to_anndata(known).write_h5ad("known.h5ad")
    made.to_anndata([new]).write_h5ad("query.h5ad")
    ingest(["known.h5ad"], "atlas.zarr", batch_key="batch", label_keys=["label"], report=lambda _: None)
    names: dict[str, Any] = {"sca": sca}
    exec(compile(USE, "docs/add-a-model.md", "exec"), names)

    run, mapped = names["run"], names["mapped"]
    assert run.history[-1]["train/elbo"] < run.history[0]["train/elbo"]
    assert names["loadings"].shape == (80, 10)
    (query,) = mapped.queries
    assert query["state"] == "done", query["reason"]
    assert query["labels"]["label"]["accuracy"] > 0.7
    assert "X_LDVAE" in ad.read_h5ad("mapped/query.h5ad").obsm
    written = ad.read_zarr("expression.zarr")
    np.testing.assert_allclose(written.layers["ldvae_expression"].sum(1), 1, rtol=1e-4)

    # and by commands: its settings, surgery in an update, an output decoded in a batch
    ingest(["query.h5ad"], "new.zarr", batch_key="batch", label_keys=["label"], report=lambda _: None)
    small = ["--epochs", "1", "--threads", "1"]
    assert (
        main(["train", "--data", "atlas.zarr", "--model", "ldvae", "--model.n-hidden", "8", "--out", "r", *small]) == 0
    )
    assert main(["train", "--data", "new.zarr", "--update", "runs/ldvae/model", "--out", "runs/more", *small]) == 0
    assert len(read_latent("runs/more/model/latent.zarr")) == made.n_cells
    line = ["embed", "runs/more/model", "new.zarr", "--out", "o.zarr", "--output", "expression"]
    assert main([*line, "--transform-batch", known[0]]) == 0


def test_no_file_but_the_registry_names_a_model_to_run_it() -> None:
    """The engine and the loaders know no model, and the jobs that run every model import none by its name."""
    root = PAGE.parents[1]
    own = {"arithmetic.py", "correction.py", "programs.py", "trained.py"}  # what one kind of model alone offers
    named = re.compile(rf"scarcade\.models\.({'|'.join(MODELS)})\b")
    for folder in ("engine", "dataloaders", "jobs"):
        for path in sorted((root / folder).glob("*.py")):
            if path.name not in own:
                imports = [
                    line for line in path.read_text().splitlines() if line.lstrip().startswith(("from", "import"))
                ]
                assert not named.search("\n".join(imports)), f"{folder}/{path.name}"
