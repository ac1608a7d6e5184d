"""A split that is one window is decoded once, and gives the batches that it would give anew in each epoch."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scarcade.dataloaders.aligned import aligned
from scarcade.dataloaders.held import HeldSource
from scarcade.dataloaders.labelled import WithLabelled, with_labelled
from scarcade.dataloaders.loader import CellLoader, LoaderConfig, stream
from scarcade.dataloaders.sources import Runs, Source, StoreSource
from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.stratified import stratified
from scarcade.dataloaders.superbatch import Superbatch
from scarcade.engine.contracts import Batch, Loader
from scarcade.engine.errors import CorruptError
from scarcade.engine.schema import Shard
from tests.dataloaders.made import Made, make

CPU = torch.device("cpu")
CONFIG = LoaderConfig(batch_size=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("held") / "atlas.zarr")


def held(made: Made, shard: Shard = Shard(), config: LoaderConfig = CONFIG) -> CellLoader:  # noqa: B008
    loader = stream(made.store, "train", config, seed=3, shard=shard)
    assert isinstance(loader.source, HeldSource)
    return loader


def anew(like: CellLoader, source: Source) -> CellLoader:
    """The same stream, decoded in every epoch."""
    return CellLoader(source, like.plan, like.first, like.shard)


def same(a: Batch, b: Batch) -> None:
    for field in fields(Batch):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if field.name == "counts":
            assert torch.equal(one.dense(CPU), other.dense(CPU))
            assert all(np.array_equal(x, y) for x, y in zip(one.csr(), other.csr(), strict=True))
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        elif isinstance(one, np.ndarray):
            assert np.array_equal(one, other)
        elif field.name == "labelled":
            assert (one is None) == (other is None)
            if one is not None:
                same(one, other)
        elif field.name != "together":
            assert one == other, field.name


def alone(loader: CellLoader) -> Loader:
    return loader


def beside_labelled(loader: CellLoader) -> Loader:
    found = with_labelled(loader, CONFIG, seed=5)
    assert isinstance(found, WithLabelled)
    return found


def evenly(loader: CellLoader) -> Loader:
    return stratified(loader, seed=5)


def evenly_beside_labelled(loader: CellLoader) -> Loader:
    return beside_labelled(stratified(loader, seed=5))


@pytest.mark.parametrize("of", [alone, beside_labelled, evenly, evenly_beside_labelled])
@pytest.mark.parametrize("shard", [Shard(), Shard(1, 3)])
def test_the_batches_are_those_of_decoding_anew(made: Made, of: Callable[[CellLoader], Loader], shard: Shard) -> None:
    kept = held(made, shard)
    one, other = of(kept), of(anew(kept, StoreSource(made.store)))
    for epoch, start in ((0, 0), (1, 0), (2, 17), (1, 0)):
        batches = list(one.epoch(epoch, start))
        assert len(batches) == one.steps_per_epoch - start
        for a, b in zip(batches, other.epoch(epoch, start), strict=True):
            same(a, b)
        assert batches[0].proteins is not None


class Counting:
    """A source that says how many cells were decoded."""

    def __init__(self, source: StoreSource) -> None:
        self.source, self.cells, self.told = source, 0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def ahead(self, runs: Runs) -> None:
        self.told += 1
        self.source.ahead(runs)

    def load(self, runs: Runs, order: np.ndarray) -> Superbatch:
        self.cells += len(order)
        return self.source.load(runs, order)


@pytest.mark.parametrize("of", [alone, beside_labelled, evenly])
def test_each_cell_is_decoded_once(made: Made, of: Callable[[CellLoader], Loader]) -> None:
    like = held(made)
    source = Counting(StoreSource(made.store))
    loader = of(anew(like, HeldSource(source, like.first, like.n_cells)))  # type: ignore[arg-type]
    for epoch in range(3):
        assert sum(len(batch) for batch in loader.epoch(epoch)) == like.n_cells
    assert source.cells == like.n_cells
    assert source.told <= 2  # that of the labelled cells, and that of all


def test_what_is_larger_is_not_kept(made: Made) -> None:
    n = held(made).n_cells
    window = LoaderConfig(batch_size=64, window=n - 64)
    loader = stream(made.store, "train", window, seed=3)
    assert isinstance(loader.source, StoreSource)
    assert loader.read_ahead
    # of the memory half is for one window; less than this option allows, for there are few cells
    room = CONFIG.model_copy(update={"memory": 2 * (n + 64) * (4 * made.store.nnz // made.store.n_cells)})
    held(made, config=room)
    many = stream(made.store, "train", room, seed=3, shard=Shard(0, 2))  # each worker would keep all of them
    assert isinstance(many.source, StoreSource)
    assert isinstance(stream(made.store, "all", CONFIG, seed=0, lanes=1, shuffle=False).source, StoreSource)


def test_genes_that_the_model_has_not_take_no_memory(tmp_path: Path) -> None:
    made = make(tmp_path / "atlas.zarr")
    few = replace(made.store.schema, genes=made.store.schema.genes[5:15])
    loader = stream(aligned(made.store, few, min_genes=0), "train", CONFIG, seed=3)
    assert isinstance(loader.source, HeldSource)
    total = sum(len(batch.counts.csr()[1]) for batch in loader.epoch(0))
    kept = loader.source._held
    assert kept is not None
    assert len(kept.indices) == len(kept.data) == total < made.store.nnz / 2
    for batch in loader.epoch(1):
        assert np.array_equal(batch.counts.dense(CPU).numpy(), made.counts[batch.rows].toarray()[:, 5:15])


def test_a_worker_without_a_cell(tmp_path: Path) -> None:
    """Of a split of one cell two of three workers have none, and take part in its step."""
    made = make(tmp_path / "atlas.zarr", n=40)
    config = LoaderConfig(batch_size=64, validation=0.05)
    for keep in (True, False):
        cells = []
        for rank in range(3):
            loader = stream(made.store, "validation", config, seed=0, shard=Shard(rank, 3))
            loader = loader if keep else anew(loader, StoreSource(made.store))
            (batch,) = loader.epoch(0)
            assert batch.counts.dense(CPU).shape == (len(batch), 50)
            assert batch.proteins is not None
            assert len(batch.proteins) == len(batch)
            cells.append(len(batch))
        assert cells == [1, 0, 0]


def test_a_fault_on_disk_is_raised_each_time_it_is_met(tmp_path: Path) -> None:
    made = make(tmp_path / "atlas.zarr")
    loader = held(made)
    shard = next(path for path in (tmp_path / "atlas.zarr" / "X" / "data").rglob("*") if path.name != "zarr.json")
    while shard.is_dir():
        shard = next(shard.iterdir())
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)
    loader = stream(open_store(tmp_path / "atlas.zarr"), "train", CONFIG, seed=3)
    for _ in range(2):
        with pytest.raises(CorruptError):
            next(iter(loader.epoch(0)))
