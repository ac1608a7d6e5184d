import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.errors import (
    CategoryError,
    CorruptError,
    CsrError,
    InputError,
    MissingChunkError,
    OpenError,
    UsageError,
)
from scarcade.engine.folder import MANIFEST, read_manifest, write_json, write_manifest
from tests.dataloaders.made import Made, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("store") / "atlas.zarr")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.store.path, tmp_path / "copy.zarr"))


def matrix(store: Store, start: int, stop: int) -> sp.csr_matrix:
    indptr, indices, data = store.read(start, stop)
    return sp.csr_matrix((data, indices.astype(np.int32), indptr), (stop - start, store.n_genes))


def everything(path: Path) -> list[object]:
    """All that can be read from a store."""
    store = open_store(path)
    parts: list[object] = [store.schema, store.seed, store.n_cells, *store.read(0, store.n_cells)]
    parts += [store.codes(name) for name in ("donor", "cell_type", "sex", "age", "size")]
    parts += [store.obs(), store.var(), store.truth(), store.keys(0, store.n_cells), store.n_before(0.3)]
    parts += [*(store.proteins(0, store.n_cells) or ())]
    parts += [batch.counts.csr() for batch in stream(store, "train", LoaderConfig(), seed=0).epoch(0)]
    return parts


def same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, pd.DataFrame) and isinstance(other, pd.DataFrame):
        return one.equals(other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def test_rows_codes_names_and_proteins(made: Made) -> None:
    store = made.store
    assert (store.n_cells, store.n_genes, store.nnz) == (3000, 50, made.counts.nnz)
    assert store.schema == made.schema
    assert (matrix(store, 1000, 2222) != made.counts[1000:2222]).nnz == 0
    assert store.read(5, 5)[0].tolist() == [0]
    assert store.codes("donor").dtype == np.int8
    assert np.array_equal(store.codes("donor"), made.obs["donor"].cat.codes)
    expected = made.obs["cell_type"].map({"x": 0, "y": 1, "unknown": -1}).astype(int)
    assert np.array_equal(store.codes("cell_type"), expected)
    assert store.codes("age").dtype == np.float32
    assert np.allclose(store.codes("age"), made.obs["age"])
    assert store.names(2998, 3000).tolist() == ["cell2998", "cell2999"]
    pd.testing.assert_frame_equal(store.obs(100, 200), made.obs.iloc[100:200], check_index_type=False)
    both = store.proteins(10, 2000)
    assert both is not None
    assert np.array_equal(both[0], made.proteins[10:2000])
    assert np.array_equal(both[1], made.measured[10:2000])
    assert store.truth()["theta"].tolist() == [0, 1, 2]  # type: ignore[index]
    assert store.sources == [{"path": "made"}]
    assert store.verify() == []


@pytest.mark.filterwarnings("ignore:indices array has non-integer dtype:UserWarning")  # scipy, of unsigned ones
def test_anndata_reads_what_was_written(made: Made) -> None:
    adata = ad.read_zarr(made.store.path)
    assert (made.counts != adata.X.astype(np.float32)).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, made.obs, check_index_type=False)
    assert adata.var_names.tolist() == list(made.schema.genes)
    assert np.array_equal(adata.obsm["protein_counts"], made.proteins)
    assert np.array_equal(adata.uns["scarcade"]["keys"], made.keys)
    group = zarr.open_group(made.store.path, mode="r")
    sparse = ad.io.sparse_dataset(group["X"])
    assert (sparse[500:700] != made.counts[500:700]).nnz == 0


def test_scanpy_works_on_it(made: Made) -> None:
    """Nearly all of it on the small types; the rest (qc metrics) wants int32 indices, as `to_anndata` gives."""
    import scanpy as sc

    adata = ad.read_zarr(made.store.path)
    sc.pp.filter_cells(adata, min_genes=1)
    sc.pp.normalize_total(adata, target_sum=100)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=3)
    assert adata.obsm["X_pca"].shape == (adata.n_obs, 3)
    adata = made.store.to_anndata()
    sc.pp.calculate_qc_metrics(adata, inplace=True, percent_top=None)
    assert np.array_equal(adata.obs["total_counts"], np.asarray(made.counts.sum(axis=1)).ravel())


def test_the_validation_prefix(made: Made) -> None:
    for fraction in (0.0, 1e-9, 0.1, 0.5, 0.999, 1.0):
        expected = 3000 if fraction == 1.0 else int((made.keys < np.uint64(fraction * 2.0**64)).sum())
        assert made.store.n_before(fraction) == expected
    with pytest.raises(UsageError):
        made.store.n_before(1.5)


def test_the_validation_prefix_of_many_cells(tmp_path: Path) -> None:
    made = make(tmp_path / "many.zarr", n=20_000, genes=5)
    for fraction in np.linspace(0, 0.999, 23):
        assert made.store.n_before(fraction) == int((made.keys < np.uint64(fraction * 2.0**64)).sum())


def test_to_anndata_of_some_batches(made: Made) -> None:
    adata = made.store.to_anndata(["b", "c"])
    keep = made.obs["donor"].isin(["b", "c"]).to_numpy()
    assert (made.counts[keep] != adata.X).nnz == 0
    assert adata.obs_names.tolist() == made.obs.index[keep].tolist()
    assert np.array_equal(adata.obsm["protein_counts"], made.proteins[keep])
    with pytest.raises(CategoryError, match="no batch 'z'"):
        made.store.to_anndata(["z"])


def test_a_store_travels_by_its_path(made: Made) -> None:
    opens, arguments = made.store.__reduce__()  # what Ray moves to a worker
    again = opens(*arguments)
    assert arguments == (str(made.store.path), (None, None))
    assert again.fingerprint == made.store.fingerprint


def test_ranges_beyond_the_store(made: Made) -> None:
    for ask in (made.store.read, made.store.names, made.store.keys, made.store.proteins):
        with pytest.raises(UsageError, match="there are 3000"):
            ask(2999, 3001)
    with pytest.raises(CategoryError, match="no obs column 'nope'"):
        made.store.codes("nope")


def test_the_same_cells_give_the_same_bytes(made: Made, tmp_path: Path) -> None:
    assert make(tmp_path / "again.zarr", block=100).store.fingerprint == made.store.fingerprint
    assert make(tmp_path / "other.zarr", seed=1).store.fingerprint != made.store.fingerprint


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="no such folder"):
        open_store(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenError, match=MANIFEST):
        open_store(tmp_path / "empty")
    write_manifest(tmp_path / "empty", {"kind": "model"})
    with pytest.raises(OpenError, match="not that of a store"):
        open_store(tmp_path / "empty")


def test_a_newer_format(copy: Path) -> None:
    manifest = read_manifest(copy)
    write_json(copy / MANIFEST, {**manifest, "format": 99})
    with pytest.raises(OpenError, match="format 99"):
        open_store(copy)


def data_files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)


def test_every_file_is_missed(made: Made, copy: Path) -> None:
    for file in data_files(copy):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(MissingChunkError, match=str(file.relative_to(copy))):
            open_store(copy)
        file.write_bytes(b"")
        with pytest.raises(CorruptError, match=str(file.relative_to(copy))):
            open_store(copy)
        file.write_bytes(content[:-1])
        with pytest.raises(CorruptError, match=str(file.relative_to(copy))):
            open_store(copy)
        file.write_bytes(content)


def flips(path: Path, n: int) -> None:
    """Flip `n` bits anywhere in the data: each is an error or changes nothing that is read; verify finds all."""
    good = everything(path)
    rng = np.random.default_rng(0)
    files = data_files(path)
    sizes = np.array([file.stat().st_size for file in files])
    for k in range(n):
        # half by size, half one file as likely as the next: large shards and small metadata alike
        file = files[rng.choice(len(files), p=sizes / sizes.sum())] if k % 2 else files[rng.integers(len(files))]
        content = bytearray(file.read_bytes())
        at = int(rng.integers(len(content)))
        content[at] ^= 1 << int(rng.integers(8))
        before = file.read_bytes()
        file.write_bytes(content)
        with contextlib.suppress(CorruptError):
            assert same(everything(path), good), f"{file}: byte {at} was flipped, other data were read, no error"
        assert open_or_none(path) is None or open_store(path).verify() != []
        file.write_bytes(before)
    assert same(everything(path), good)


def open_or_none(path: Path) -> Store | None:
    try:
        return open_store(path)
    except CorruptError:
        return None


def test_flipped_bits(tmp_path: Path) -> None:
    flips(make(tmp_path / "small.zarr", n=300, genes=20).store.path, 60)


@pytest.mark.slow
def test_many_flipped_bits(tmp_path: Path) -> None:
    flips(make(tmp_path / "small.zarr", n=300, genes=20).store.path, 1000)


def test_a_flipped_manifest(tmp_path: Path) -> None:
    path = make(tmp_path / "small.zarr", n=300, genes=20).store.path
    good = everything(path)
    file = path / MANIFEST
    content = file.read_bytes()
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(content), 60).tolist():
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        with contextlib.suppress(InputError):
            assert same(everything(path), good)
    file.write_bytes(content)


def rewritten(path: Path, change: Callable[[Path], None]) -> Path:
    """As an attacker or another program would: changed, and the manifest made to fit."""
    extra = {key: value for key, value in read_manifest(path).items() if key != "files"}
    change(path)
    (path / MANIFEST).unlink()
    write_manifest(path, extra)
    return path


def replace_array(name: str, values: np.ndarray, chunk_rows: int | None = None) -> Callable[[Path], None]:
    from scarcade.dataloaders.array_layout import COUNTS_PER_CHUNK
    from scarcade.dataloaders.array_writer import ArrayWriter

    def change(path: Path) -> None:
        shutil.rmtree(path / name)
        writer = ArrayWriter(path / name, values.dtype, chunk_rows=COUNTS_PER_CHUNK if name != "X/indptr" else None)
        writer.append(values)
        writer.close()

    return change


def test_a_column_beyond_the_genes(made: Made, copy: Path) -> None:
    indices = made.counts.indices.astype(np.uint16)
    indices[12_345] = 50
    store = open_store(rewritten(copy, replace_array("X/indices", indices)))
    with pytest.raises(CsrError, match="gene 50 of 50"):
        store.read(0, 3000)
    with pytest.raises(CsrError, match=r"X/indices: chunk 0 .* not below the 50 genes"):
        list(stream(store, "all", LoaderConfig(), seed=0).epoch(0))


def test_negative_columns_are_refused(made: Made, copy: Path) -> None:
    with pytest.raises(CorruptError, match="X/indices is not unsigned"):
        open_store(rewritten(copy, replace_array("X/indices", made.counts.indices.astype(np.int16))))


@pytest.mark.parametrize("wrong", ["descending", "beyond", "first", "too long"])
def test_row_pointers_that_would_read_out_of_bounds(made: Made, copy: Path, wrong: str) -> None:
    indptr = made.counts.indptr.astype(np.int64)
    if wrong == "descending":
        indptr[100] = indptr[102]
    elif wrong == "beyond":
        indptr[-1] += 5
    elif wrong == "first":
        indptr[0] = -1
    else:
        indptr[1:1500] = indptr[1500]
    with pytest.raises(CsrError, match="X/indptr"):
        open_store(rewritten(copy, replace_array("X/indptr", indptr)))


def test_arrays_of_other_lengths(made: Made, copy: Path) -> None:
    with pytest.raises(CorruptError, match="the arrays hold"):
        open_store(rewritten(copy, replace_array("X/data", made.counts.data[:-1])))


def test_codes_beyond_the_categories(made: Made, copy: Path) -> None:
    codes = made.obs["donor"].cat.codes.to_numpy().copy()
    codes[7] = 3
    with pytest.raises(CorruptError, match="codes beyond its 3 categories"):
        open_store(rewritten(copy, replace_array("obs/donor/codes", codes))).codes("donor")
    codes[7] = -1
    with pytest.raises(CategoryError, match="cell 7 has no known value in 'donor'"):
        open_store(rewritten(copy, replace_array("obs/donor/codes", codes))).codes("donor")
