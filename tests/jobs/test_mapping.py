"""Mapping: what comes out, who fails alone, what is done again and what is not."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from scarcade.engine.errors import (
    BusyError,
    InputError,
    ModelFileError,
    OpenError,
    PartialError,
    StorageError,
    SurroundingsError,
    UsageError,
)
from scarcade.engine.lock import sole_writer
from scarcade.jobs import results
from scarcade.jobs.mapping import MapResult, map_queries
from scarcade.models.saved import read, read_delta
from scarcade.models.surgery import reference_hash
from tests.jobs.conftest import Atlas

QUICK: dict[str, Any] = {"epochs": 3, "report": {"picture": "pca"}, "optim": {"lr": 0.01}}


def test_a_query_comes_back_with_latent_labels_and_provenance(atlas: Atlas, tmp_path: Path) -> None:
    result = map_queries(atlas.model, atlas.query, tmp_path, batch_key="batch", **QUICK)
    (record,) = result.queries
    assert record["state"] == "done"
    assert record["labels"]["label"]["accuracy"] > 0.7
    before, after = ad.read_h5ad(atlas.query), ad.read_h5ad(tmp_path / "donor.h5ad")
    np.testing.assert_array_equal(after.X.toarray(), before.X.toarray())
    assert list(after.obs_names) == list(before.obs_names)
    assert set(before.obs.columns) < set(after.obs.columns)
    assert after.obsm["X_scVI"].shape == (before.n_obs, 6)
    assert set(after.obs["label_pred"].cat.categories) == set(atlas.store.schema.labels[0].values)
    assert after.obs["label_uncertainty"].between(0, 1).all()
    assert (after.obs["reference_distance"] > 0).all()
    provenance = json.loads(after.uns["scarcade"]["mapping"])
    assert provenance["reference"] == result.reference == read(atlas.model).fingerprint
    assert provenance["batches"] == [atlas.new_batch]
    assert provenance["settings"]["optim"]["epochs"] == 3


def test_the_delta_rebuilds_the_model_that_embedded_the_query(atlas: Atlas, tmp_path: Path) -> None:
    from scarcade.jobs.embed import embed
    from scarcade.jobs.latent import read_latent

    map_queries(atlas.model, atlas.query, tmp_path, batch_key="batch", **QUICK)
    reference = read(atlas.model)
    grown = read_delta(tmp_path / "donor.delta", reference)
    assert reference_hash(grown) == reference_hash(reference)
    embed(grown, atlas.query, tmp_path / "again.zarr", batch_key="batch")
    wanted = ad.read_h5ad(tmp_path / "donor.h5ad").obsm["X_scVI"]
    np.testing.assert_allclose(read_latent(tmp_path / "again.zarr").mean, wanted, atol=1e-5)


def test_summary_has_the_documented_fields(atlas: Atlas, tmp_path: Path) -> None:
    result = map_queries(atlas.model, atlas.query, tmp_path, **QUICK)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reference"] == result.reference
    (row,) = summary["queries"]
    fixed = {"name", "path", "state", "reason", "n_cells", "genes_found", "genes_wanted", "seconds"}
    assert fixed <= set(row)
    assert (row["name"], row["state"], row["reason"]) == ("donor", "done", None)
    assert row["n_cells"] == ad.read_h5ad(atlas.query).n_obs
    assert row["genes_found"] == row["genes_wanted"] == 150
    with open(tmp_path / "summary.csv") as file:
        assert next(csv.DictReader(file))["state"] == "done"


def test_without_a_batch_key_the_batch_is_named_after_the_file(atlas: Atlas, tmp_path: Path) -> None:
    (record,) = map_queries(atlas.model, atlas.query, tmp_path, **QUICK).queries
    assert record["new"] == {"batch": ["donor"]}


def test_the_same_call_again_does_nothing_and_another_setting_maps_again(
    atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = map_queries(atlas.model, atlas.query, tmp_path, **QUICK)
    stamp = (tmp_path / "donor.h5ad").stat().st_mtime_ns
    assert map_queries(atlas.model, atlas.query, tmp_path, **QUICK).queries == first.queries
    assert (tmp_path / "donor.h5ad").stat().st_mtime_ns == stamp
    again = map_queries(atlas.model, atlas.query, tmp_path, seed=1, **QUICK)
    assert again.queries[0]["key"] != first.queries[0]["key"]
    assert (tmp_path / "donor.h5ad").stat().st_mtime_ns != stamp


@pytest.mark.parametrize("lost", ["donor.h5ad", "donor.delta", ".records/donor.json"])
def test_a_result_that_is_not_whole_is_made_again(lost: str, atlas: Atlas, tmp_path: Path) -> None:
    map_queries(atlas.model, atlas.query, tmp_path, **QUICK)
    wanted = ad.read_h5ad(tmp_path / "donor.h5ad").obsm["X_scVI"]
    path = tmp_path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / ".tmp-donor-123.h5ad").write_bytes(b"left by a kill")
    assert map_queries(atlas.model, atlas.query, tmp_path, **QUICK).queries[0]["state"] == "done"
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "donor.h5ad").obsm["X_scVI"], wanted)
    assert not list(tmp_path.glob(".tmp*"))


def bad_ones(atlas: Atlas, folder: Path) -> dict[str, Path]:
    """Queries that cannot be mapped, each for a reason of its own."""
    folder.mkdir()
    good = ad.read_h5ad(atlas.query)
    bad = {name: folder / f"{name}.h5ad" for name in ("truncated", "nan", "fraction", "genes", "pickle", "csr", "zero")}
    bad["truncated"].write_bytes(atlas.query.read_bytes()[:20_000])
    bad["pickle"].write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    bad["zero"].write_bytes(b"")
    for name, value in (("nan", np.nan), ("fraction", 0.5)):
        broken = good.copy()
        broken.X.data[7] = value
        broken.write_h5ad(bad[name])
    strange = good.copy()
    strange.var_names = [f"no_{i}" for i in range(strange.n_vars)]
    strange.write_h5ad(bad["genes"])
    shutil.copy(atlas.query, bad["csr"])
    with h5py.File(bad["csr"], "r+") as file:
        file["X/indices"][3] = 1_000_000
    return bad


def test_bad_queries_fail_alone_and_the_others_are_as_if_they_were_not_there(atlas: Atlas, tmp_path: Path) -> None:
    bad = bad_ones(atlas, tmp_path / "in")
    alone = map_queries(atlas.model, atlas.query, tmp_path / "alone", **QUICK)
    result = map_queries(atlas.model, [*bad.values(), atlas.query], tmp_path / "out", **QUICK)
    states = {record["name"]: record["state"] for record in result.queries}
    assert states == {**dict.fromkeys(bad, "failed"), "donor": "done"}
    reasons = {record["name"]: record["reason"] for record in result.queries}
    assert "truncated" in reasons["truncated"]
    assert "fractions" in reasons["fraction"]
    assert all(str(bad[name]) in reasons[name] for name in bad)
    for name in bad:
        assert not list((tmp_path / "out").glob(f"{name}*"))
    one, other = (ad.read_h5ad(tmp_path / where / "donor.h5ad").obsm["X_scVI"] for where in ("alone", "out"))
    np.testing.assert_array_equal(one, other)
    assert alone.queries[0]["labels"] == result.queries[-1]["labels"]
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(PartialError, match="7 of 8 queries could not be mapped"):
        result.raise_if_failed()


def test_a_failed_query_is_mapped_once_it_is_mended(atlas: Atlas, tmp_path: Path) -> None:
    query = tmp_path / "donor.h5ad"
    query.write_bytes(atlas.query.read_bytes()[:20_000])
    failed = map_queries(atlas.model, query, tmp_path / "out", **QUICK)
    with pytest.raises(InputError):
        failed.raise_if_failed()
    shutil.copy(atlas.query, query)
    map_queries(atlas.model, query, tmp_path / "out", **QUICK).raise_if_failed()


def test_a_query_without_cells_and_one_with_a_single_cell(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)
    cells[:0].copy().write_h5ad(tmp_path / "none.h5ad")
    cells[:1].copy().write_h5ad(tmp_path / "one.h5ad")
    queries = [tmp_path / "none.h5ad", tmp_path / "one.h5ad"]
    result = map_queries(atlas.model, queries, tmp_path / "out", **QUICK)
    assert [record["state"] for record in result.queries] == ["done", "done"], result.queries
    none, one = (ad.read_h5ad(tmp_path / "out" / f"{name}.h5ad") for name in ("none", "one"))
    assert none.obsm["X_scVI"].shape == (0, 6)
    assert np.isfinite(one.obsm["X_scVI"]).all()
    assert one.obs["label_pred"].notna().all()


def test_genes_in_another_order_with_others_among_them_change_nothing(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)
    order = np.random.default_rng(0).permutation(cells.n_vars)
    extra = ad.AnnData(np.ones((cells.n_obs, 3), np.float32))
    extra.var_names, extra.obs_names = ["x1", "x2", "x3"], cells.obs_names
    mixed = ad.concat([cells[:, order], extra], axis=1, merge="first")
    (tmp_path / "mixed").mkdir()
    mixed.write_h5ad(tmp_path / "mixed" / "donor.h5ad")
    map_queries(atlas.model, atlas.query, tmp_path / "a", **QUICK)
    map_queries(atlas.model, tmp_path / "mixed", tmp_path / "b", **QUICK)
    one, other = (ad.read_h5ad(tmp_path / where / "donor.h5ad") for where in ("a", "b"))
    np.testing.assert_array_equal(one.obsm["X_scVI"], other.obsm["X_scVI"])
    assert other.n_vars == cells.n_vars + 3


def test_a_batch_of_the_reference_is_used_as_it_is(atlas: Atlas, tmp_path: Path) -> None:
    cells = atlas.store.to_anndata(["batch0"])
    result = map_queries(atlas.model, {"known": cells}, tmp_path, batch_key="batch", **QUICK)
    (record,) = result.queries
    assert record["new"] == {}
    assert record["history"] == []
    assert any("nothing was trained" in note for note in record["warnings"])
    assert any("'batch0'" in note for note in record["warnings"])


def test_known_and_new_batches_stand_in_one_query(atlas: Atlas, tmp_path: Path) -> None:
    new, known = ad.read_h5ad(atlas.query)[:80].copy(), atlas.store.to_anndata(["batch0"])[:40].copy()
    for cells in (new, known):
        cells.obs["batch"] = cells.obs["batch"].astype(str)
    both = ad.concat([new, known], index_unique="-")
    (record,) = map_queries(atlas.model, {"both": both}, tmp_path, batch_key="batch", **QUICK).queries
    assert (record["state"], record["new"], record["n_batches"]) == ("done", {"batch": [atlas.new_batch]}, 2)
    assert record["history"]
    assert any("'batch0'" in note for note in record["warnings"])
    grown = read_delta(tmp_path / "both.delta", read(atlas.model))
    assert grown.schema.batch.values == (*read(atlas.model).schema.batch.values, atlas.new_batch)


def test_labels_of_some_cells_are_scored_and_the_others_left_out(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)
    truth = cells.obs["label"].astype(str).to_numpy(object)
    part = np.arange(cells.n_obs) % 3
    cells.obs["label"] = [label if p == 0 else [None, "not known"][p - 1] for label, p in zip(truth, part, strict=True)]
    record, plain = map_queries(
        atlas.model,
        {"part": cells, "none": cells[part == 1].copy()},
        tmp_path,
        unlabelled=["not known"],
        **QUICK,
    ).queries
    assert record["labels"]["label"]["n_cells"] == (part == 0).sum()
    assert record["labels"]["label"]["n_unknown"] == 0
    assert "accuracy" not in plain["labels"]["label"]
    assert sum(plain["labels"]["label"]["composition"].values()) == (part == 1).sum()


def test_an_anndata_in_memory_is_a_query_and_stays_as_it_was(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)
    columns = list(cells.obs.columns)
    result = map_queries(atlas.model, {"patient 1": cells, "patient 2": cells.copy()}, tmp_path, **QUICK)
    assert [record["name"] for record in result.queries] == ["patient 1", "patient 2"]
    assert list(cells.obs.columns) == columns
    assert not cells.obsm
    assert (tmp_path / "patient 1.h5ad").is_file()


def test_labels_of_the_query_are_scored_and_never_seen_by_training(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)
    truth = cells.obs["label"].astype(str)
    cells.obs["mine"] = np.where(np.arange(cells.n_obs) % 2, truth, "something else")
    del cells.obs["label"]
    cells.write_h5ad(tmp_path / "donor.h5ad")
    named = map_queries(atlas.model, tmp_path / "donor.h5ad", tmp_path / "a", label_key=["mine"], **QUICK).queries[0]
    plain = map_queries(atlas.model, tmp_path / "donor.h5ad", tmp_path / "b", **QUICK).queries[0]
    scored = named["labels"]["label"]
    assert (scored["n_cells"], scored["n_unknown"]) == (cells.n_obs // 2, cells.n_obs - cells.n_obs // 2)
    assert "accuracy" not in plain["labels"]["label"]
    assert scored["composition"] == plain["labels"]["label"]["composition"]


@pytest.mark.long
def test_ray_tasks_give_what_one_process_gives(atlas: Atlas, tmp_path: Path) -> None:
    queries = {"a": ad.read_h5ad(atlas.query), "b": atlas.query, "bad": ad.AnnData(np.ones((3, 2), np.float32))}
    here = map_queries(atlas.model, queries, tmp_path / "here", threads=1, **QUICK)
    there = map_queries(atlas.model, queries, tmp_path / "there", workers=1, threads=1, **QUICK)
    assert [r["state"] for r in there.queries] == [r["state"] for r in here.queries] == ["done", "done", "failed"]
    for name in ("a", "b"):
        one, other = (ad.read_h5ad(tmp_path / where / f"{name}.h5ad").obsm["X_scVI"] for where in ("here", "there"))
        np.testing.assert_array_equal(one, other)


def test_settings_that_cannot_be_meant_are_refused_before_anything_is_read(atlas: Atlas, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"optim\.lr"):
        map_queries(atlas.model, atlas.query, tmp_path / "out", optim={"lr": -1})
    with pytest.raises(UsageError, match="nonsense"):
        map_queries(atlas.model, atlas.query, tmp_path / "out", nonsense={"lr": 1})
    with pytest.raises(UsageError, match=r"--data\.edit-labels: .*--transfer\.edit"):
        map_queries(atlas.model, atlas.query, tmp_path / "out", data={"edit_labels": True})
    with pytest.raises(UsageError, match=r"--data\.samples-per-label 9: .*--surgery\.use-labels"):
        map_queries(atlas.model, atlas.query, tmp_path / "out", data={"samples_per_label": 9})
    with pytest.raises(UsageError, match=r"--surgery\.model\.min-program-genes 3: .*scvi has none"):
        map_queries(atlas.model, atlas.query, tmp_path / "out", surgery={"model": {"min_program_genes": 3}})
    with pytest.raises(UsageError, match=r"--scale\.gpus"):
        map_queries(atlas.model, atlas.query, tmp_path / "out", scale={"gpus": True})
    with pytest.raises(OpenError):
        map_queries(tmp_path / "none", atlas.query, tmp_path / "out")
    with pytest.raises(OpenError):
        map_queries(atlas.model, tmp_path / "none.h5ad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--out .*is a file"):
        map_queries(atlas.model, atlas.query, tmp_path / "file")


@pytest.mark.parametrize("results", ["h5ad", "zarr"])
def test_results_do_not_take_the_place_of_queries(atlas: Atlas, tmp_path: Path, results: str) -> None:
    query = tmp_path / "donor.h5ad"
    shutil.copyfile(atlas.query, query)
    before = query.read_bytes()
    with pytest.raises(UsageError, match=r"--out .*: holds the query .*donor\.h5ad"):
        map_queries(atlas.model, tmp_path, tmp_path, results=results, **QUICK)
    assert query.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["donor.h5ad"]


def test_the_folder_of_the_reference_is_not_for_results(atlas: Atlas) -> None:
    with pytest.raises(UsageError, match="folder of the reference"):
        map_queries(atlas.model, atlas.query, atlas.model, **QUICK)


def test_early_stopping_wants_cells_to_watch(atlas: Atlas, tmp_path: Path) -> None:
    for setting in ("early_stopping", "plateau"):
        with pytest.raises(UsageError, match=r"--data\.validation is 0"):
            map_queries(atlas.model, atlas.query, tmp_path, optim={setting: True})


def test_cells_without_counts_are_told(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)[:30].copy()
    counts = cells.X.toarray()
    counts[:4] = 0
    cells.X = sp.csr_matrix(counts)
    (record,) = map_queries(atlas.model, {"q": cells}, tmp_path, **QUICK).queries
    assert any("4 of 30 cells have no counts" in line for line in record["warnings"])


def test_a_file_of_the_other_format_that_is_not_ours_stays(atlas: Atlas, tmp_path: Path) -> None:
    (tmp_path / "donor.zarr").mkdir()
    (tmp_path / "donor.zarr" / "own").write_text("work of years")
    map_queries(atlas.model, atlas.query, tmp_path, **QUICK).raise_if_failed()
    assert (tmp_path / "donor.zarr" / "own").read_text() == "work of years"


def test_a_second_command_does_not_write_to_the_same_folder(atlas: Atlas, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "summary.json"), pytest.raises(BusyError, match="another process"):
        map_queries(atlas.model, atlas.query, tmp_path, **QUICK)
    map_queries(atlas.model, atlas.query, tmp_path, **QUICK).raise_if_failed()


def test_text_with_gaps_stays_in_the_result(atlas: Atlas, tmp_path: Path) -> None:
    cells = ad.read_h5ad(atlas.query)[:40].copy()
    cells.obs["note"] = np.array(["seen", None] * 20, dtype=object)
    result = map_queries(atlas.model, {"q": cells}, tmp_path / "out", **QUICK)
    result.raise_if_failed()
    note = ad.read_h5ad(tmp_path / "out" / "q.h5ad").obs["note"]
    assert note.isna().sum() == 20
    assert set(note.dropna()) == {"seen"}


def test_a_latent_of_another_model_is_refused(atlas: Atlas, tmp_path: Path) -> None:
    from scarcade.jobs.latent import latent_arrays, latent_writer

    shutil.copytree(atlas.model, tmp_path / "model", ignore=shutil.ignore_patterns("latent.zarr"))
    manifest = json.loads((tmp_path / "model" / "MANIFEST.json").read_text())
    manifest["files"] = {n: f for n, f in manifest["files"].items() if not n.startswith("latent.zarr")}
    (tmp_path / "model" / "MANIFEST.json").write_text(json.dumps(manifest))
    (record,) = map_queries(tmp_path / "model", atlas.query, tmp_path / "out", **QUICK).queries
    assert record["state"] == "done"
    assert record["labels"] == {}
    assert any("no labels were transferred" in note for note in record["warnings"])
    with latent_writer(tmp_path / "model" / "latent.zarr", obsm_key="X_scVI", columns=[], about={}) as writer:
        writer.append(latent_arrays("X_scVI", *np.zeros((2, 5, 3), np.float32)), [])
    with pytest.raises(ModelFileError, match="dimensions"):
        map_queries(tmp_path / "model", atlas.query, tmp_path / "out2", **QUICK)


def test_how_a_mapping_ends_depends_on_what_failed() -> None:
    def result(*states: tuple[str, int]) -> MapResult:
        records = tuple(
            {"name": str(i), "state": s, "reason": "why", "exit_code": c} for i, (s, c) in enumerate(states)
        )
        return MapResult(Path("out"), "", records)

    result(("done", 0), ("done", 0)).raise_if_failed()
    with pytest.raises(PartialError, match="1 of 2"):
        result(("done", 0), ("failed", 4)).raise_if_failed()
    with pytest.raises(InputError):
        result(("failed", 4)).raise_if_failed()
    with pytest.raises(SurroundingsError):
        result(("failed", 5), ("failed", 4)).raise_if_failed()


def test_a_result_that_could_not_be_written_leaves_nothing(
    atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any) -> None:
        raise StorageError(f"{path}: the disk is full")

    monkeypatch.setattr(results, "write_result", full)
    found = map_queries(atlas.model, atlas.query, tmp_path / "m", epochs=1)
    assert [record["state"] for record in found.queries] == ["failed"]
    assert not list((tmp_path / "m").glob("*.delta"))
    monkeypatch.undo()
    again = map_queries(atlas.model, atlas.query, tmp_path / "m", epochs=1)
    assert [record["state"] for record in again.queries] == ["done"]
    assert list((tmp_path / "m").glob("*.delta"))
