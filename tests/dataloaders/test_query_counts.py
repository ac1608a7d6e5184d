"""A query's counts held, streamed and looked at: the same cells, the same checks, the same errors."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import Columns, LoaderConfig, of_source
from scarcade.dataloaders.query_counts import Keep, QuerySource, Seen, keep_for_mapping, seen, source_of
from scarcade.dataloaders.schema import Query, read_query
from scarcade.dataloaders.scratch import Scratch
from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.stored_counts import Stored, StoredSource
from scarcade.dataloaders.stratified import stratified
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.contracts import Batch
from scarcade.engine.errors import CountsError, StorageError
from scarcade.engine.folder import sweep
from scarcade.engine.schema import Categories, Schema
from tests.dataloaders.files import adata, written

SEED = 7
CONFIG = LoaderConfig(batch_size=32, window=128, validation=0.2)
GENES = tuple(f"g{i:02d}" for i in (19, 3, 25, *range(4, 19)))  # another order, one gene missing, others left out
REFERENCE = Schema(GENES, Categories("batch", ("shared",)))


def keeping(folder: Path, limit: int) -> Keep:
    return keep_for_mapping(Scratch(folder, "q"), limit=limit, seed=SEED)


def source(query: Query, reference: Schema = REFERENCE) -> QuerySource:
    schema = Schema(reference.genes, Categories("batch", tuple(map(str, range(query.n_cells)))))
    columns = Columns(batch=np.arange(query.n_cells))  # every cell a batch of its own
    return source_of(query.counts, columns, schema, seed=SEED, keys=query.keys)


def same(one: Batch, other: Batch) -> None:
    cpu = torch.device("cpu")
    assert np.array_equal(one.rows, other.rows)
    assert torch.equal(one.batch, other.batch)
    assert torch.equal(one.counts.dense(cpu), other.counts.dense(cpu))


def same_batches(held: QuerySource, streamed: QuerySource) -> None:
    assert isinstance(streamed, StoredSource)
    assert (held.n_cells, held.nnz) == (streamed.n_cells, streamed.nnz)
    for split in ("train", "validation", "all"):
        loaders = [of_source(one, split, CONFIG, seed=3) for one in (held, streamed)]
        for epoch in (0, 1):
            for a, b in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
                same(a, b)
    ordered = [of_source(one, "all", CONFIG, seed=0, lanes=1, shuffle=False).epoch(0) for one in (held, streamed)]
    for a, b in zip(*ordered, strict=True):
        same(a, b)
    assert np.array_equal(held.batches(), streamed.batches())


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_streamed_counts_give_the_batches_of_those_in_memory(tmp_path: Path, layout: str, ending: str) -> None:
    data = adata(700)
    data.X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda m: m.toarray()}[layout](data.X)
    path = written(data, tmp_path / f"q{ending}")
    held = read_query(path, REFERENCE, keep=keeping(tmp_path, 1 << 20))
    streamed = read_query(path, REFERENCE, keep=keeping(tmp_path, 0))
    same_batches(source(held), source(streamed))
    looked = read_query(path, REFERENCE, keep=lambda unread: seen(unread, Scratch(tmp_path, "looked")))
    assert looked.counts == Seen(700, len(held.csr.data))
    assert held.keys is None


def test_labelled_and_stratified_cells_and_proteins_are_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    schema = Schema(GENES, Categories("batch", ("a", "b")), (Categories("label", ("x", "y")),), (), proteins=("p", "q"))
    columns = Columns(
        batch=(rng.random(400) < 0.1).astype(int),
        labels=rng.integers(-1, 2, 400),
        proteins=rng.integers(0, 50, (400, 2)),
        proteins_measured=rng.random((400, 2)) < 0.5,
    )
    config = LoaderConfig(batch_size=32, window=128, validation=0.2, samples_per_label=20)
    both = []
    for limit in (1 << 30, 0):
        query = read_query(adata(400), REFERENCE, keep=keeping(tmp_path, limit))
        cells = of_source(source_of(query.counts, columns, schema, seed=SEED), "train", config, seed=3)
        both.append(with_labelled(stratified(cells, seed=3), config, seed=3))
    for a, b in zip(*(loader.epoch(1) for loader in both), strict=True):
        same(a, b)
        assert a.labelled is not None
        assert b.labelled is not None
        same(a.labelled, b.labelled)
        for name in ("labels", "proteins", "proteins_measured"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_an_anndata_in_memory_is_streamed_too(tmp_path: Path) -> None:
    data = adata(300)
    held, streamed = (read_query(data, REFERENCE, keep=keeping(tmp_path, limit)) for limit in (1 << 20, 0))
    same_batches(source(held), source(streamed))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return simulate(tmp_path_factory.mktemp("query") / "q.zarr", cells=500, genes=40, batches=3, labels=2, seed=4)


@pytest.mark.filterwarnings("ignore:.*of the reference's:UserWarning")
@pytest.mark.parametrize("change", ["same genes", "more genes, in another order, some left out"])
def test_a_store_is_streamed_where_it_lies(store: Store, tmp_path: Path, change: str) -> None:
    genes = store.schema.genes
    if change != "same genes":
        genes = (*(f"new{i}" for i in range(300)), *reversed(genes[5:]))
    reference = Schema(genes, Categories("batch", ()))
    held = read_query(store.path, reference, min_genes=0.0, keep=keeping(tmp_path, 1 << 30))
    streamed = read_query(store.path, reference, min_genes=0.0, keep=keeping(tmp_path, 0))
    assert isinstance(streamed.counts, Stored)
    assert streamed.counts.store.path == store.path
    assert not list(tmp_path.iterdir())
    assert held.keys is not None
    same_batches(source(held, reference), source(streamed, reference))


def test_the_estimate_is_of_what_is_stored(tmp_path: Path) -> None:
    data = adata(100)
    sparse, dense = data.X.nnz * 8, data.n_obs * data.n_vars * 8
    for matrix, n_bytes in ((data.X, sparse), (data.X.toarray(), dense)):
        one = ad.AnnData(matrix, obs=data.obs, var=data.var)
        assert not isinstance(read_query(one, REFERENCE, keep=keeping(tmp_path, n_bytes)).counts, Stored)
        assert isinstance(read_query(one, REFERENCE, keep=keeping(tmp_path, n_bytes - 1)).counts, Stored)


def test_a_wrong_count_is_the_same_error_however_it_is_read(tmp_path: Path) -> None:
    data = adata(90)
    data.X.data[500] = 0.5
    told = []
    for keep in (keeping(tmp_path, 1 << 30), keeping(tmp_path, 0), seen):
        with pytest.raises(CountsError, match="not counts") as error:
            read_query(data, REFERENCE, layer="X", keep=keep)
        told.append(str(error.value))
    assert len(set(told)) == 1


def test_scratch_is_removed_swept_and_made_anew(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, "a-old-name / with anything")
    (scratch.made() / "left").write_text("by a killed process")
    assert not list(scratch.made().iterdir())
    scratch.remove()
    scratch.remove()
    assert not list(tmp_path.iterdir())
    (scratch.made() / "left").write_text("by a killed process")
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Scratch(tmp_path / "file", "q").made()


def test_counts_for_another_seed_or_not_kept_are_refused(tmp_path: Path) -> None:
    query = read_query(adata(60), REFERENCE, keep=keeping(tmp_path, 0))
    columns, schema = Columns(batch=np.zeros(60, int)), Schema(GENES, Categories("batch", ("a",)))
    for counts, seed in ((query.counts, SEED + 1), (Seen(60, 100), SEED)):
        with pytest.raises(ValueError, match="not kept, or for another seed"):
            source_of(counts, columns, schema, seed=seed)
    with pytest.raises(TypeError, match="not held in memory"):
        assert query.csr
    assert open_store(Scratch(tmp_path, "q").path / "counts.zarr").n_cells == 60
