"""trVAE and expiMap from a store to a mapped query, and what expiMap says of its programs."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import GenesError, UsageError
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.programs import enrichment, program_genes, program_table, with_programs
from scarcade.jobs.train import train
from scarcade.jobs.train_config import resolved
from scarcade.jobs.trained import load
from scarcade.models.expimap import Expimap
from scarcade.models.saved import read, read_delta
from scarcade.models.surgery import reference_hash
from scarcade.models.trvae import Trvae
from tests.jobs.conftest import Atlas

NAMES = ["made_2", "made_0", "made_3", "made_1"]
"""In the order of the file, which is that of the latent; not sorted, as those of Reactome are not."""
QUICK: dict[str, Any] = {"epochs": 2, "report": {"picture": "pca"}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("programs") / "a.zarr"
    return simulate(out, cells=600, genes=120, batches=3, labels=3, seed=2, programs=4)


@pytest.fixture(scope="module")
def gmt(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs that the atlas was made with, and one of strangers."""
    truth = store.truth()
    assert truth is not None
    loading = truth["program_loading"]
    genes = np.array(store.schema.genes)
    lines = [f"{name}\tna\t" + "\t".join(genes[loading[int(name[-1])] > 0]) for name in NAMES]
    path = tmp_path_factory.mktemp("gmt") / "made.gmt"
    path.write_text("\n".join([*lines, "strangers\tna\tX1\tX2"]))
    return path


def settings(**model: Any) -> dict[str, Any]:
    return {
        "model": {"hidden_layer_sizes": [16], **model},
        "scale": {"threads": 1},
        "data": {"batch_size": 64},
    }


@pytest.fixture(scope="module")
def expimap(store: Store, gmt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expimap")
    train(store, "expimap", out=out, programs=[gmt], epochs=3, settings=settings(min_program_genes=2))
    return out / "model"


@pytest.mark.parametrize("recon_loss", ["nb", "zinb", "mse"])
def test_trvae_trains_and_resumes_by_name(store: Store, tmp_path: Path, recon_loss: str) -> None:
    given = settings(recon_loss=recon_loss, n_latent=4)
    done = train(store, "trvae", out=tmp_path, epochs=2, settings=given)
    assert isinstance(done.model.model, Trvae)
    assert {"train/mmd", "train/reconstruction", "validation/elbo"} <= done.history[-1].keys()
    assert done.history[0]["kl_weight"] == 1
    more = train(store, "trvae", out=tmp_path, epochs=3, settings=given)
    assert len(more.history) == 3
    assert np.isfinite(more.model.get_latent_representation(store)).all()


def test_programs_of_files_are_in_the_model(store: Store, gmt: Path, expimap: Path) -> None:
    model = read(expimap)
    assert isinstance(model, Expimap)
    assert list(model.config.programs) == NAMES
    assert "programs = " not in (expimap.parent / "config.toml").read_text()  # a table of lines
    latent = load(expimap).get_latent_representation(store)
    assert np.shape(latent) == (600, 4)


def test_what_the_model_says_of_its_programs(store: Store, expimap: Path) -> None:
    trained = load(expimap)
    table = program_table(trained)
    assert list(table.index) == NAMES
    assert (table["genes_with_weight"] <= table["genes"]).all()
    assert table["active"].all()
    for name in NAMES:
        genes = program_genes(trained, name)
        assert genes["in_program"].all()
        assert genes["weight"].abs().is_monotonic_decreasing
    found = enrichment(trained, store, "label")
    assert len(found) == 3 * 4
    assert found["bayes_factor"].between(-28, 28).all()
    one = enrichment(trained, store, "label", store.schema.labels[0].values[0], use_directions=False)
    assert set(one["group1"]) == {store.schema.labels[0].values[0]}
    with pytest.raises(UsageError, match="no program"):
        program_genes(trained, "typo")


def test_a_query_learns_new_programs_on_the_reference(store: Store, expimap: Path, gmt: Path, tmp_path: Path) -> None:
    query = store.to_anndata([store.schema.batch.values[0]])
    query.obs["batch"] = "new"
    query.write_h5ad(tmp_path / "q.h5ad")
    new = tmp_path / "new.gmt"
    lines = {"new": store.schema.genes[:20], "last": store.schema.genes[30:50]}
    new.write_text("\n".join(f"{name}\tna\t" + "\t".join(genes) for name, genes in lines.items()))
    before = reference_hash(read(expimap))
    result = map_queries(
        expimap,
        tmp_path / "q.h5ad",
        tmp_path / "out",
        batch_key="batch",
        **QUICK,
        surgery={"model": {"n_ext": 1, "new_programs": str(new), "use_hsic": True}},
    )
    (record,) = result.queries
    assert record["state"] == "done", record["reason"]
    assert reference_hash(read(expimap)) == before
    assert ad.read_h5ad(tmp_path / "out" / "q.h5ad").obsm["X_expiMap"].shape[1] == 7
    grown = read_delta(tmp_path / "out" / "q.delta", read(expimap))
    assert isinstance(grown, Expimap)
    assert grown.terms_names[4:] == ["new", "last", "unconstrained_0"]
    for name, genes in lines.items():
        assert set(program_genes(grown, name).index) == set(genes)


def test_a_query_maps_onto_trvae(store: Store, tmp_path: Path) -> None:
    train(store, "trvae", out=tmp_path / "run", epochs=1, settings=settings(n_latent=4))
    query = store.to_anndata([store.schema.batch.values[0]])
    query.obs["batch"] = "new"
    query.write_h5ad(tmp_path / "q.h5ad")
    result = map_queries(tmp_path / "run" / "model", tmp_path / "q.h5ad", tmp_path / "out", batch_key="batch", **QUICK)
    (record,) = result.queries
    assert record["state"] == "done", record["reason"]
    assert ad.read_h5ad(tmp_path / "out" / "q.h5ad").obsm["X_trVAE"].shape[1] == 4


def test_programs_as_settings(store: Store, gmt: Path) -> None:
    genes = store.schema.genes
    given = with_programs({"programs": str(gmt), "min_program_genes": "2", "n_ext": 1}, genes)
    assert len(given["programs"]) == 4
    assert given["n_ext"] == 1
    assert "min_program_genes" not in given
    named = {"programs": {"p": [genes[0]]}}
    assert with_programs(named, genes) == named
    with pytest.raises(GenesError, match="0 of 5 programs"):
        with_programs({"programs": [gmt], "min_program_genes": 100}, genes)
    with pytest.raises(UsageError, match="whole number"):
        with_programs({"programs": [gmt], "min_program_genes": "few"}, genes)


def test_sizes_of_programs_are_refused_where_no_file_is_read(store: Store, gmt: Path) -> None:
    genes = store.schema.genes
    for name, model, said in (
        ("scvi", {}, r"--model\.min-program-genes 2: .* scvi has none"),
        ("expimap", {"programs": {"p": list(genes[:5])}}, r"--model\.min-program-genes 2: .*no \.gmt file is given"),
    ):
        with pytest.raises(UsageError, match=said):
            resolved({"model": {**model, "min_program_genes": 2}}, name=name, store=store)
    of_file = resolved({"model": {"programs": [str(gmt)], "min_program_genes": 2}}, name="expimap", store=store)
    assert len(of_file.model["programs"]) == 4


def test_expimap_without_programs_says_what_it_wants(store: Store, tmp_path: Path, atlas: Atlas) -> None:
    with pytest.raises(UsageError, match=r"--programs FILE\.gmt"):
        train(store, "expimap", out=tmp_path, epochs=1)
    with pytest.raises(UsageError, match="scvi model"):
        program_table(load(atlas.model))
