import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scarcade.dataloaders.inflated import InflatedArray, inflated
from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.schema import DataWarning
from scarcade.dataloaders.store import Store
from scarcade.engine.cluster import cluster
from scarcade.engine.errors import CategoryError, CountsError, GenesError, InputError, OpenError, UsageError
from tests.dataloaders.files import adata, quiet, written


def by_name(store: Store) -> pd.DataFrame:
    """Counts of a store as a table of cells x genes."""
    indptr, indices, data = store.read(0, store.n_cells)
    dense = sp.csr_matrix((data, indices, indptr), (store.n_cells, store.n_genes)).toarray()
    return pd.DataFrame(dense, index=store.names(0, store.n_cells), columns=list(store.schema.genes))


def table(data: ad.AnnData) -> pd.DataFrame:
    x = data.X.toarray() if sp.issparse(data.X) else data.X
    return pd.DataFrame(np.asarray(x), index=data.obs_names, columns=data.var_names)


def run(files: Any, out: Path, **settings: Any) -> Store:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return ingest(files, out, report=quiet, **settings)


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["h5ad", "v2.zarr", "v3.zarr"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_every_layout_of_every_format_gives_the_same_store(tmp_path: Path, suffix: str, layout: str) -> None:
    data = adata(200, 30)
    wanted = table(data)
    data.X = {"csr": data.X, "csc": data.X.tocsc(), "dense": data.X.toarray()}[layout]
    path = written(data, tmp_path / f"a.{suffix}", version=3 if "v3" in suffix else 2)
    store = run(path, tmp_path / "out.zarr", batch_key="batch", label_keys=["cell_type"], unlabelled=["unknown"])
    assert by_name(store).loc[wanted.index, wanted.columns].equals(wanted.astype(np.uint8))
    assert store.verify() == []
    obs = store.obs().loc[data.obs_names]
    assert (obs["batch"].astype(str) == data.obs["batch"].astype(str)).all()
    assert np.array_equal(obs["depth"], data.obs["depth"])
    known = data.obs["cell_type"].isin(["T", "B"])
    assert store.schema.labels[0].values == ("B", "T")
    assert (obs["cell_type"].isna() == ~known).all()
    keys = store.keys(0, store.n_cells)
    assert (np.diff(keys.astype(object)) > 0).all()
    assert np.array_equal(ad.read_zarr(store.path)[data.obs_names].X.toarray(), wanted)


def test_blocks_and_buckets_are_seams_that_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scarcade.dataloaders import matrix, shuffle

    path = written(adata(500, 30), tmp_path / "a.h5ad")
    whole = run(path, tmp_path / "whole.zarr", batch_key="batch")
    monkeypatch.setattr(matrix, "_POINTERS", 37)
    monkeypatch.setattr(shuffle, "BUCKET", 1 << 10)
    assert shuffle.bits_for(500 * 30, 500) > 4
    cut = run(path, tmp_path / "cut.zarr", batch_key="batch")
    assert cut.fingerprint == whole.fingerprint


def test_csc_is_turned_by_files_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scarcade.dataloaders.counts import Place
    from scarcade.dataloaders.matrix import blocks
    from scarcade.dataloaders.source import AnnDataFile

    data = adata(300, 30)
    wanted = data.X.toarray()
    data.X = data.X.tocsc()
    with AnnDataFile(written(data, tmp_path / "a.h5ad")) as file:
        matrix = file.matrix("X")
        parts = list(blocks(matrix, Place("a"), size=500, workspace=tmp_path))
    assert len(parts) > 5
    dense = [sp.csr_matrix((c.data, c.indices, c.indptr), (c.n_cells, 30)).toarray() for _, c in parts]
    assert np.array_equal(np.concatenate(dense), wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


def test_the_order_of_files_does_not_matter_nor_whether_they_come_at_once(tmp_path: Path) -> None:
    one = written(adata(80, 20, seed=1, prefix="x"), tmp_path / "one.h5ad")
    two = written(adata(90, 25, seed=2, prefix="x", first_gene=5), tmp_path / "two.h5ad")
    three = written(adata(70, 22, seed=3, prefix="y", first_gene=2), tmp_path / "three.zarr")
    settings: dict[str, Any] = {"batch_key": "batch", "label_keys": ["cell_type"], "unlabelled": ["unknown"]}
    whole = run([one, two, three], tmp_path / "whole.zarr", **settings)
    assert run([three, one, two], tmp_path / "other.zarr", **settings).fingerprint == whole.fingerprint
    run([two], tmp_path / "grown.zarr", **settings)
    run([one], tmp_path / "grown.zarr", append=True, **settings)
    grown = run([three, one], tmp_path / "grown.zarr", append=True, **settings)
    assert grown.fingerprint == whole.fingerprint
    for name in (p.relative_to(whole.path) for p in whole.path.rglob("*") if p.is_file()):
        assert (whole.path / name).read_bytes() == (grown.path / name).read_bytes(), name
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_append_keeps_genes_that_were_chosen_and_its_settings(tmp_path: Path) -> None:
    one = written(adata(80, 20, seed=1), tmp_path / "one.h5ad")
    two = written(adata(90, 20, seed=2), tmp_path / "two.h5ad")
    first = run(one, tmp_path / "s.zarr", batch_key="batch", hvg=8)
    grown = run(two, tmp_path / "s.zarr", batch_key="batch", hvg=8, append=True)
    assert grown.schema.genes == first.schema.genes
    assert grown.n_cells == 170
    with pytest.raises(UsageError, match="was made with hvg = 8"):
        run(two, tmp_path / "s.zarr", batch_key="batch", append=True)


def test_the_same_command_again_returns_the_store_and_another_is_refused(tmp_path: Path) -> None:
    path = written(adata(), tmp_path / "a.h5ad")
    first = run(path, tmp_path / "s.zarr")
    stamp = (tmp_path / "s.zarr" / "MANIFEST.json").stat().st_mtime_ns
    assert run(path, tmp_path / "s.zarr").fingerprint == first.fingerprint
    assert (tmp_path / "s.zarr" / "MANIFEST.json").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="exists already"):
        run(path, tmp_path / "s.zarr", seed=1)
    assert run(path, tmp_path / "s.zarr", seed=1, replace=True).seed == 1


def test_union_intersection_and_list(tmp_path: Path) -> None:
    one, two = adata(30, 10, seed=1), adata(30, 10, seed=2, first_gene=4)
    two.obs_names = [f"d{i}" for i in range(30)]
    files = [written(one, tmp_path / "one.h5ad"), written(two, tmp_path / "two.h5ad")]
    with pytest.warns(DataWarning, match="does not measure 4 of the store's 14 genes") as told:
        store = ingest(files, tmp_path / "u.zarr", report=quiet)
    assert len(told) == 2
    assert store.n_genes == 14
    assert (by_name(store).loc[one.obs_names, [f"g{i}" for i in range(10, 14)]] == 0).all(axis=None)
    assert run(files, tmp_path / "i.zarr", genes="intersection").schema.genes == tuple(
        f"g{i:02d}" for i in range(4, 10)
    )
    (tmp_path / "genes.txt").write_text("g07\ng05\n")
    listed = run(files, tmp_path / "l.zarr", genes=str(tmp_path / "genes.txt"))
    assert listed.schema.genes == ("g07", "g05")
    assert by_name(listed).loc[two.obs_names].equals(table(two)[["g07", "g05"]].astype(np.uint8))


def test_files_with_ids_and_files_with_symbols_become_one(tmp_path: Path) -> None:
    one, two = adata(30, 10, seed=1, prefix="x"), adata(30, 10, seed=2, prefix="y")
    one.var["feature_name"] = list(one.var_names)
    one.var_names = [f"ENSG{i:011d}.{i}" for i in range(10)]
    store = run([written(one, tmp_path / "one.h5ad"), written(two, tmp_path / "two.h5ad")], tmp_path / "s.zarr")
    assert store.n_genes == 10
    assert store.schema.genes == tuple(two.var_names)
    assert list(store.var()["gene_id"]) == [f"ENSG{i:011d}" for i in range(10)]


def test_counts_are_found_where_they_are_and_the_decision_is_told(tmp_path: Path) -> None:
    data = adata()
    kept = data.X.copy()
    data.layers["counts"] = kept
    data.X = np.log1p(data.X.toarray())
    told: list[str] = []
    store = ingest(written(data, tmp_path / "a.h5ad"), tmp_path / "s.zarr", report=told.append)
    assert "counts are taken from 'counts' (X: holds fractions, counts: counts)" in told[0]
    assert store.schema.counts_from == "counts"
    raw = adata(genes=30)
    raw.raw = raw
    raw = raw[:, :12].copy()
    raw.X = np.log1p(raw.X.toarray())
    store = run(written(raw, tmp_path / "raw.h5ad"), tmp_path / "raw.zarr")
    assert (store.n_genes, store.schema.counts_from) == (30, "raw.X")
    del data.layers["counts"]
    with pytest.raises(CountsError, match=r"no matrix holds raw counts: 'X' holds fractions"):
        run(written(data, tmp_path / "n.h5ad"), tmp_path / "n.zarr")
    with pytest.raises(CountsError, match=r"layer 'X': \d+ values are not counts.*cell 'c0'"):
        run(tmp_path / "n.h5ad", tmp_path / "n.zarr", layer="X")
    with pytest.raises(OpenError, match="has no layer 'spliced'; it has X"):
        run(tmp_path / "n.h5ad", tmp_path / "n.zarr", layer="spliced")
    real = run(tmp_path / "n.h5ad", tmp_path / "n.zarr", allow_noninteger=True)
    assert real.read(0, 3)[2].dtype == np.float32


def test_values_choose_the_smallest_type(tmp_path: Path) -> None:
    for most, kind in ((200, np.uint8), (60000, np.uint16), (10**6, np.uint32)):
        data = adata()
        data.X[3, 4] = most
        store = run(written(data, tmp_path / f"{most}.h5ad"), tmp_path / f"{most}.zarr")
        assert store.read(0, 5)[2].dtype == kind


def test_proteins_that_were_not_measured_are_no_zeros(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one, two, three = (adata(40, 10, seed=i, prefix=f"f{i}-") for i in range(3))
    values = rng.poisson(5, (40, 3)).astype(np.float32)
    values[5] = np.nan
    one.obsm["protein"] = pd.DataFrame(values, index=one.obs_names, columns=["CD3", "CD4", "CD19"])
    two.obsm["protein"] = rng.poisson(5, (40, 2))
    two.uns["protein_names"] = ["CD4", "CD8"]
    for data in (one, two, three):
        data.obs["has"] = np.arange(40) % 4 > 0
    files = [written(data, tmp_path / f"{i}.h5ad") for i, data in enumerate((one, two, three))]
    with pytest.warns(DataWarning, match=r"2.h5ad: has no obsm\['protein'\]"):
        store = ingest(files, tmp_path / "s.zarr", protein_key="protein", protein_measured_key="has", report=quiet)
    assert store.schema.proteins == ("CD19", "CD3", "CD4", "CD8")
    both = store.proteins(0, 120)
    assert both is not None
    names, columns = pd.Index(store.names(0, 120)), list(store.schema.proteins)
    counts, measured = (pd.DataFrame(one, names, columns) for one in both)
    assert not measured.loc[three.obs_names].to_numpy().any()
    assert not measured.loc[["f0-5", "f0-4", "f1-8"]].to_numpy().any()
    assert list(measured.loc["f0-6"]) == [True, True, True, False]
    assert list(counts.loc["f0-6", ["CD3", "CD4", "CD19"]]) == values[6].tolist()
    assert list(counts.loc["f1-7", ["CD4", "CD8"]]) == two.obsm["protein"][7].tolist()
    two.obsm["protein"] = two.obsm["protein"] - 1.5
    with pytest.raises(CountsError, match="not counts of a protein"):
        run(written(two, tmp_path / "bad.h5ad"), tmp_path / "bad.zarr", protein_key="protein")


def test_columns_that_all_files_share_are_kept_with_one_set_of_categories(tmp_path: Path) -> None:
    one, two = adata(30, 10, seed=1, prefix="x"), adata(1200, 10, seed=2, prefix="y")
    one.obs["only"] = 1
    one.obs["n"], two.obs["n"] = 3, 2.5
    one.obs["mixed"], two.obs["mixed"] = 1, "two"
    one.obs["barcode"], two.obs["barcode"] = [f"p{i}" for i in range(30)], [f"q{i}" for i in range(1200)]
    one.obs["flag"], two.obs["flag"] = True, False
    told: list[str] = []
    files = [written(one, tmp_path / "one.h5ad"), written(two, tmp_path / "two.h5ad")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        store = ingest(
            files, tmp_path / "s.zarr", batch_key="batch", categorical=["sex"], continuous=["depth"], report=told.append
        )
    obs = store.obs()
    assert any("left out: only" in line for line in told)
    assert store.schema.batch.values == ("b1", "b2", "shared")
    assert (store.schema.categorical[0].values, store.schema.continuous) == (("f", "m"), ("depth",))
    assert obs["n"].dtype == np.float64
    assert list(obs["mixed"].cat.categories) == ["1", "two"]
    assert obs.loc["y77", "barcode"] == "q77"
    assert obs["flag"].dtype == bool


def test_a_missing_batch_is_an_error_and_no_key_means_one_batch_a_file(tmp_path: Path) -> None:
    data = adata()
    path = written(data, tmp_path / "donor7.h5ad")
    assert run(path, tmp_path / "s.zarr").schema.batch.values == ("donor7",)
    with pytest.raises(CategoryError, match=r"has no obs column 'donor'.*batch, cell_type"):
        run(path, tmp_path / "t.zarr", batch_key="donor")
    data.obs["batch"] = data.obs["batch"].astype(object)
    data.obs.loc["c3", "batch"] = np.nan
    with pytest.raises(CategoryError, match=r"'batch'.*is empty for 1 of 60 cells: 'c3'"):
        run(written(data, tmp_path / "nan.h5ad"), tmp_path / "t.zarr", batch_key="batch")
    assert not list(tmp_path.glob("*t.zarr*"))


def test_values_that_look_like_no_label_are_pointed_out(tmp_path: Path) -> None:
    path = written(adata(), tmp_path / "a.h5ad")
    with pytest.warns(DataWarning, match="'cell_type' has the values 'unknown', which look like no label"):
        ingest(path, tmp_path / "s.zarr", label_keys=["cell_type"], report=quiet)


def test_duplicate_genes_and_same_files_are_refused(tmp_path: Path) -> None:
    data = adata()
    path = written(data, tmp_path / "a.h5ad")
    shutil.copy(path, tmp_path / "copy.h5ad")
    with pytest.raises(UsageError, match="same content"):
        run(tmp_path, tmp_path / "s.zarr", batch_key="batch")
    data.var_names = ["g0", *data.var_names[:-2], "g0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written(data, tmp_path / "twice.h5ad")
    with pytest.raises(GenesError, match="1 gene names stand more than once: g0"):
        run(tmp_path / "twice.h5ad", tmp_path / "s.zarr")
    with pytest.raises(OpenError, match=r"\*\.loom: no \.h5ad or \.zarr is there"):
        run(tmp_path / "*.loom", tmp_path / "s.zarr")


def test_cells_of_one_name_and_batch_in_two_files_are_kept_and_pointed_out(tmp_path: Path) -> None:
    files = [written(adata(30, 10, seed=i), tmp_path / f"{i}.h5ad") for i in range(2)]
    with pytest.warns(DataWarning, match="have the batch and name of a cell in another file"):
        store = ingest(files, tmp_path / "s.zarr", batch_key="batch", report=quiet)
    assert store.n_cells == 60


def test_files_without_cells(tmp_path: Path) -> None:
    empty = written(adata()[:0].copy(), tmp_path / "empty.h5ad")
    with pytest.raises(InputError, match="no cells"):
        run(empty, tmp_path / "s.zarr")
    full = written(adata(), tmp_path / "full.h5ad")
    assert run([empty, full], tmp_path / "s.zarr", batch_key="batch").n_cells == 60


@pytest.mark.long
def test_files_are_read_by_ray_tasks_to_the_same_store(tmp_path: Path) -> None:
    files = [written(adata(50, 12, seed=i, prefix=f"{i}-"), tmp_path / f"{i}.h5ad") for i in range(3)]
    here = run(files, tmp_path / "here.zarr", hvg=6)
    seen: list[tuple[int, int, str]] = []
    bad = adata(50, 12, seed=9)
    bad.X.data[bad.X.indptr[7]] = 0.5
    broken = written(bad, tmp_path / "bad.h5ad")
    with cluster(cpus=2):  # one session for both
        there = run(files, tmp_path / "there.zarr", hvg=6, workers=2, progress=lambda *one: seen.append(one))
        with pytest.raises(CountsError, match="cell 'c7'"):
            run([*files, broken], tmp_path / "no.zarr", layer="X", workers=2)
    assert there.fingerprint == here.fingerprint
    assert seen[-1] == (150, 150, "write")


_KILLED = """
import sys, time
from scarcade.dataloaders.inflated import InflatedArray, inflated
from scarcade.dataloaders.ingest import ingest
def stop(done, total, stage):
    if stage == sys.argv[3]:
        print("here", flush=True)
        time.sleep(60)
ingest(sys.argv[1], sys.argv[2], progress=stop)
"""


@pytest.mark.parametrize("stage", ["read", "write"])
def test_a_killed_ingest_leaves_nothing_and_runs_again(tmp_path: Path, stage: str) -> None:
    path = written(adata(), tmp_path / "a.h5ad")
    out = tmp_path / "out" / "s.zarr"
    out.parent.mkdir()
    command = [sys.executable, "-c", _KILLED, str(path), str(out), stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        os.kill(child.pid, signal.SIGKILL)
    assert not out.exists()
    assert list(out.parent.iterdir())
    assert run(path, out).n_cells == 60
    assert [p.name for p in out.parent.iterdir()] == ["s.zarr"]


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_gzipped_file_gives_the_store_of_one_that_is_not(tmp_path: Path, layout: str) -> None:
    data = adata(700, 60)
    data.X = data.X if layout == "csr" else data.X.tocsc()
    stores = []
    for name, options in (("plain", {}), ("gzip", {"compression": "gzip"})):
        folder = tmp_path / name
        folder.mkdir()
        data.write_h5ad(folder / "a.h5ad", **options)
        stores.append(run(folder / "a.h5ad", tmp_path / f"{name}.zarr", batch_key="batch"))
    with h5py.File(tmp_path / "gzip" / "a.h5ad") as file:
        assert isinstance(inflated(file["X/data"]), InflatedArray)
    assert by_name(stores[1]).equals(by_name(stores[0]))
    assert np.array_equal(stores[0].keys(0, 700), stores[1].keys(0, 700))


@pytest.mark.parametrize("part", ["data", "indices"])
def test_a_damaged_gzip_is_told_and_leaves_nothing(tmp_path: Path, part: str) -> None:
    adata(700, 60).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad") as file:
        n = file[f"X/{part}"].id.get_num_chunks()
        where = file[f"X/{part}"].id.get_chunk_info(n - 1)
    content = bytearray((tmp_path / "a.h5ad").read_bytes())
    content[where.byte_offset + where.size // 2] ^= 0xFF
    (tmp_path / "a.h5ad").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.h5ad"):
        run(tmp_path / "a.h5ad", tmp_path / "out.zarr", batch_key="batch")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


@pytest.mark.parametrize("key", ["X/data", "obs/batch/codes"])
def test_bytes_that_cannot_be_unpacked_are_told_with_what_helps(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.h5ad"
    data = adata(400, 40)
    data.obs["batch"] = data.obs["batch"].astype("category")
    data.write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file[key].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 0x55
    content[chunk.byte_offset + chunk.size - 1] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(OpenError, match="copy or download the file again"):
        run([path], tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
