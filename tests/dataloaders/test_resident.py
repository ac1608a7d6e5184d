"""Counts that stay on a GPU, tested in the memory of a CPU where there is none; with one see also `test_on_gpu`."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch

from scarcade.dataloaders import resident
from scarcade.dataloaders.aligned import aligned
from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import CellLoader, LoaderConfig, stream
from scarcade.dataloaders.prefetch import SideBySide
from scarcade.dataloaders.resident import Resident, room_on
from scarcade.dataloaders.sources import Source, StoreSource
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.stratified import stratified
from scarcade.engine.schema import Shard
from tests.every_model import made_store
from tests.gpu import DEVICE, needs_a_gpu

CPU = torch.device("cpu")
CONFIG = LoaderConfig(batch_size=32, window=128)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(Path(tmp_path_factory.mktemp("resident")) / "a.zarr")


def fewer_genes(store: Store) -> Source:
    """The store for a model that has two thirds of its genes, in another order."""
    genes = store.schema.genes
    chosen = [genes[place] for place in np.random.default_rng(0).permutation(len(genes))[: 2 * len(genes) // 3]]
    return aligned(store, replace(store.schema, genes=tuple(chosen))).source()


def noted(source: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cells that `source` is asked for."""
    load = source.load
    asked: list[int] = []

    def loading(runs: Any, order: Any) -> Any:
        asked.extend(row for start, stop in runs for row in range(start, stop))
        return load(runs, order)

    monkeypatch.setattr(source, "load", loading)
    return asked


def some_runs(rng: np.random.Generator, first: int, stop: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    cuts = first + np.sort(rng.choice(stop - first, 6, replace=False))
    runs = [(int(a), int(b)) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    return runs, rng.permutation(sum(b - a for a, b in runs))


@pytest.mark.parametrize("made", [StoreSource, fewer_genes])
def test_cells_are_those_of_the_source_and_are_read_once(
    store: Store, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, stop = 37, store.n_cells - 5
    source = made(store)
    asked = noted(source, monkeypatch)
    resident, plain, rng = Resident(source, store, first, stop, DEVICE), made(store), np.random.default_rng(1)
    for _ in range(12):
        runs, order = some_runs(rng, first, stop)
        one, other = resident.load(runs, order), plain.load(runs, order)
        assert np.array_equal(one.rows, other.rows)
        for mine, theirs in zip(one.csr(3, len(order)), other.csr(3, len(order)), strict=True):
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs)
        places = rng.permutation(len(order))[:5]
        for mine, theirs in zip(one.of_cells(places).csr(0, 5), other.of_cells(places).csr(0, 5), strict=True):
            assert np.array_equal(mine, theirs)
    assert len(set(asked)) == len(asked)
    resident.load([(first, stop)], np.arange(stop - first))
    assert sorted(asked) == list(range(first, stop))
    resident.load([(first, stop)], np.arange(stop - first))
    assert len(asked) == stop - first


def test_no_cell_at_all(store: Store) -> None:
    assert len(Resident(StoreSource(store), store, 0, 9, DEVICE).load([], np.empty(0, np.int64)).rows) == 0


def test_several_threads_may_ask(store: Store) -> None:
    resident, plain, rng = Resident(StoreSource(store), store, 0, store.n_cells, DEVICE), StoreSource(store), 3
    wanted = [some_runs(np.random.default_rng(rng + number), 0, store.n_cells) for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: resident.load(*one), wanted))
    for one, (runs, order) in zip(found, wanted, strict=True):
        for mine, theirs in zip(one.csr(0, len(order)), plain.load(runs, order).csr(0, len(order)), strict=True):
            assert np.array_equal(mine, theirs)


def resident_loader(store: Store, plain: CellLoader, shard: Shard = Shard()) -> CellLoader:  # noqa: B008 - frozen
    """As `plain`, with counts that stay; its batches are made on a CPU."""
    source = StoreSource(store)
    resident = Resident(source, store, plain.first, plain.first + plain.n_cells, CPU)
    loader = CellLoader(source, plain.plan, plain.first, shard, resident=resident)
    loader._making = SideBySide(2)
    return loader


@pytest.mark.parametrize("window", [128, 1 << 15])
def test_batches_are_those_of_a_loader_that_keeps_nothing(
    store: Store, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoaderConfig(batch_size=32, window=window)
    plain = stream(store, "train", config, seed=0)
    loader = resident_loader(store, plain)
    asked = noted(loader.source, monkeypatch)
    for epoch, start in ((0, 3), (0, 0), (1, 0), (2, 0), (3, 0), (3, 5)):
        for one, other in zip(loader.epoch(epoch, start), plain.epoch(epoch, start), strict=True):
            assert np.array_equal(one.rows, other.rows)
            assert torch.equal(one.counts.dense(CPU), other.counts.dense(CPU))
            assert torch.equal(one.counts.log1p(CPU), other.counts.log1p(CPU))
            assert all(np.array_equal(a, b) for a, b in zip(one.counts.csr(), other.counts.csr(), strict=True))
    assert len(asked) == plain.n_cells


def test_workers_hold_what_they_have_trained_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        shard = Shard(rank, 2)
        plain = stream(store, "train", CONFIG, seed=0, shard=shard)
        loader = resident_loader(store, plain, shard)
        asked = noted(loader.source, monkeypatch)
        held = []
        for epoch in range(4):
            for one, other in zip(loader.epoch(epoch), plain.epoch(epoch), strict=True):
                assert torch.equal(one.counts.dense(CPU), other.counts.dense(CPU))
            held.append(len(asked))
        assert held[0] < held[1] <= held[3] <= plain.n_cells


def test_labelled_cells_beside_the_others_are_taken_from_what_is_there(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a few of each label, drawn anew in each epoch."""
    for more in ({}, {"samples_per_label": 7}):
        config = CONFIG.model_copy(update=more)
        plain = stream(store, "train", config, seed=0)
        loader = resident_loader(store, plain)
        asked = noted(loader.source, monkeypatch)
        one_by_one = with_labelled(plain, config, seed=0), with_labelled(loader, config, seed=0)
        for epoch in range(3):
            for one, other in zip(*(cells.epoch(epoch) for cells in one_by_one), strict=True):
                assert one.labelled is not None
                assert other.labelled is not None
                assert np.array_equal(one.labelled.rows, other.labelled.rows)
                assert torch.equal(one.labelled.labels, other.labelled.labels)
                assert torch.equal(one.labelled.counts.dense(CPU).clone(), other.labelled.counts.dense(CPU))
            asked.clear() if epoch == 0 else None
        assert asked == []  # all had come in the first


@pytest.mark.parametrize("stays", [True, False])
def test_a_worker_without_a_labelled_cell_in_a_window(
    store: Store, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, config = Shard(7, 8), CONFIG.model_copy(update={"samples_per_label": 1})
    plain = stream(store, "train", config, seed=0, shard=shard)
    loader = resident_loader(store, plain, shard) if stays else stream(store, "train", config, seed=0, shard=shard)
    beside = with_labelled(loader, config, seed=0)
    if not stays:
        monkeypatch.setattr(beside, "_hold", False)
    found = []
    for one, other in zip(beside.epoch(0), with_labelled(plain, config, seed=0).epoch(0), strict=True):
        assert one.labelled is not None
        assert other.labelled is not None
        assert np.array_equal(one.labelled.rows, other.labelled.rows)
        assert torch.equal(one.labelled.counts.dense(CPU), other.labelled.counts.dense(CPU))
        found.append(len(one.labelled))
    assert 0 in found


def test_cells_that_are_drawn_are_taken_from_what_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stream(store, "train", CONFIG, seed=0)
    loader = resident_loader(store, plain)
    asked = noted(loader.source, monkeypatch)
    drawn = stratified(plain, seed=0), stratified(loader, seed=0)
    for epoch in range(3):
        for one, other in zip(*(cells.epoch(epoch) for cells in drawn), strict=True):
            assert np.array_equal(one.rows, other.rows)
            assert torch.equal(one.counts.dense(CPU), other.counts.dense(CPU))
    assert len(asked) <= 2 * plain.n_cells  # two threads may want the same at first


def test_what_a_split_takes(store: Store) -> None:
    assert Resident.bytes_for(store, 0, store.n_cells, 3) == 3 * store.nnz + 12 * store.n_cells
    assert room_on(CPU, None) == 0


def test_what_other_splits_will_take_is_not_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(resident, "_there", WeakSet())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1_000_000, 2_000_000))
    assert (room_on(gpu, None), room_on(gpu, 900_000), room_on(gpu, 9_000_000)) == (250_000, 900_000, 1_000_000)
    other = Resident(StoreSource(store), store, 0, store.n_cells, DEVICE)
    other.device = gpu
    taken = other.bytes
    assert 10_000 < taken < 100_000
    assert room_on(gpu, None) == (1_000_000 - taken) // 4
    assert room_on(gpu, 900_000) == 900_000 - taken
    other.device = DEVICE
    other.load([(0, 9)], np.arange(9))
    other.device = gpu
    assert room_on(gpu, None) == 250_000  # what it has is not free already
    assert room_on(gpu, 900_000) == 900_000 - taken
    assert room_on(torch.device("cuda", 1), None) == 250_000
    del other
    gc.collect()
    assert room_on(gpu, 900_000) == 900_000


@needs_a_gpu
def test_counts_stay_if_they_fit(store: Store) -> None:
    free = torch.cuda.mem_get_info(DEVICE)[0]
    assert 0 < room_on(DEVICE, None) <= free // 4
    assert room_on(DEVICE, 5) == 5
    for given, stay in ((None, True), (0, False), (1000, False)):
        config = CONFIG.model_copy(update={"gpu_memory": given})
        loader = stream(store, "train", config, seed=0, device=DEVICE)
        assert (loader.resident is not None) is stay
