import threading
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.loader import CellLoader, Columns, LoaderConfig, in_memory, stream
from scarcade.dataloaders.prefetch import SideBySide
from scarcade.engine.contracts import Batch, Loader, Noise
from scarcade.engine.errors import CorruptError, MissingChunkError, UsageError
from scarcade.engine.schema import Position, Shard
from tests.dataloaders.made import Made, made_cells, make

CPU = torch.device("cpu")
CONFIG = LoaderConfig(batch_size=64, window=640)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("loader") / "atlas.zarr")


def memory(made: Made, **options: Any) -> CellLoader:
    columns = Columns(
        batch=made.store.codes("donor"),
        labels=made.store.codes("cell_type"),
        categorical=(made.store.codes("sex"),),
        continuous=(made.store.codes("age"),),
        size_factor=made.store.codes("size"),
        proteins=made.proteins,
        proteins_measured=made.measured,
    )
    return in_memory(made.counts, columns, made.schema, CONFIG, seed=3, **options)


def check(made: Made, batch: Batch) -> None:
    """Everything in a batch is that of its rows."""
    rows = batch.rows
    assert np.array_equal(batch.counts.dense(CPU).numpy(), made.counts[rows].toarray())
    assert np.array_equal(batch.batch, made.store.codes("donor")[rows])
    assert np.array_equal(batch.labels, made.store.codes("cell_type")[rows])
    assert batch.categorical is not None
    assert np.array_equal(batch.categorical[:, 0], made.store.codes("sex")[rows])
    assert batch.continuous is not None
    assert np.array_equal(batch.continuous[:, 0], made.store.codes("age")[rows])
    assert batch.size_factor is not None
    assert np.array_equal(batch.size_factor, made.obs["size"].to_numpy()[rows])
    assert batch.proteins is not None
    assert np.array_equal(batch.proteins, made.proteins[rows])
    assert batch.proteins_measured is not None
    assert np.array_equal(batch.proteins_measured, made.measured[rows])
    assert sum(n for _, n in batch.lanes) == len(batch) == batch.counts.shape[0]
    types = [getattr(batch, name).dtype for name in ("batch", "labels", "categorical", "continuous", "proteins")]
    assert types == [torch.int64, torch.int64, torch.int64, torch.float32, torch.float32]


def test_batches_hold_what_their_rows_say(made: Made) -> None:
    loader: Loader = stream(made.store, "train", CONFIG, seed=3)
    n_validation = made.store.n_before(0.1)
    rows = []
    for step, batch in enumerate(loader.epoch(2)):
        check(made, batch)
        last = step + 1 == loader.steps_per_epoch
        assert batch.position == (Position(3, 0) if last else Position(2, step + 1))
        assert batch.n_global == len(batch)
        rows.append(batch.rows)
    assert len(rows) == loader.steps_per_epoch
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(n_validation, 3000))
    assert loader.n_cells == 3000 - n_validation


@pytest.mark.parametrize("workers", [2, 3, 4, 6])
def test_workers_share_the_same_global_batches(made: Made, workers: int) -> None:
    alone = stream(made.store, "train", CONFIG, seed=3).epoch(1)
    parts = [stream(made.store, "train", CONFIG, seed=3, shard=Shard(r, workers)).epoch(1) for r in range(workers)]
    for whole, *shares in zip(alone, *parts, strict=True):
        assert sorted(whole.rows) == sorted(np.concatenate([share.rows for share in shares]))
        assert {share.n_global for share in shares} == {len(whole)}
        assert {share.position for share in shares} == {whole.position}
        for share in shares:
            check(made, share)
        # and a cell meets the same noise
        noise = dict(zip(whole.rows.tolist(), Noise.of_step(0, 5, whole).normal(2).tolist(), strict=True))
        for share in shares:
            own = Noise.of_step(0, 5, share).normal(2).tolist()
            assert own == [noise[row] for row in share.rows.tolist()]


def test_an_epoch_is_entered_in_its_middle(made: Made) -> None:
    loader = stream(made.store, "train", CONFIG, seed=3)
    whole = [batch.rows for batch in loader.epoch(4)]
    for start in (0, 1, 9, 10, 11, len(whole) - 1, len(whole)):
        tail = list(stream(made.store, "train", CONFIG, seed=3).epoch(4, start))
        assert [batch.rows.tolist() for batch in tail] == [rows.tolist() for rows in whole[start:]]
        for batch in tail:
            check(made, batch)
    for wrong in ((0, len(whole) + 1), (0, -1), (-1, 0)):
        with pytest.raises(UsageError, match="an epoch has steps"):
            list(loader.epoch(*wrong))


def test_memory_gives_the_batches_of_the_store(made: Made) -> None:
    for split in ("train", "validation", "all"):
        ours = memory(made, keys=made.keys, split=split, shard=Shard(1, 2))
        stored = stream(made.store, split, CONFIG, seed=3, shard=Shard(1, 2))
        for a, b in zip(ours.epoch(1), stored.epoch(1), strict=True):
            assert np.array_equal(a.rows, b.rows)
            assert (a.position, a.lanes, a.n_global) == (b.position, b.lanes, b.n_global)
            check(made, a)


def test_memory_without_keys(made: Made) -> None:
    rows = np.concatenate([batch.rows for batch in memory(made).epoch(0)])
    assert np.array_equal(np.sort(rows), np.arange(3000))
    assert not np.array_equal(rows, np.concatenate([batch.rows for batch in memory(made).epoch(1)]))
    in_order = [batch.rows for batch in memory(made, shuffle=False, lanes=1).epoch(0)]
    assert np.array_equal(np.concatenate(in_order), np.arange(3000))


def test_reading_ahead_changes_nothing(made: Made) -> None:
    here = LoaderConfig(batch_size=64, window=640, read_ahead=False)
    for a, b in zip(
        stream(made.store, "all", CONFIG, seed=1).epoch(0),
        stream(made.store, "all", here, seed=1).epoch(0),
        strict=True,
    ):
        assert np.array_equal(a.rows, b.rows)


def test_windows_made_side_by_side_are_those_made_one_by_one(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a GPU, through the ends of epochs, and after one that was not read to its end."""
    loader, told = stream(made.store, "all", CONFIG, seed=1), []
    loader._making = SideBySide(2)
    monkeypatch.setattr(loader.source, "ahead", lambda runs: told.append(tuple(runs)))
    for epoch, start in ((0, 0), (1, 0), (2, 0), (3, 20), (4, 0), (0, 0)):
        alone = stream(made.store, "all", CONFIG, seed=1).epoch(epoch, start)
        told.clear()
        for one, other in zip(loader.epoch(epoch, start), alone, strict=True):
            assert np.array_equal(one.rows, other.rows)
            check(made, one)
        assert len(set(told)) >= loader.plan.n_windows - loader.plan.window_of(start) - 1
        assert len(set(told)) == len(told)  # none of them twice
    next(loader.epoch(1))
    assert sum(len(batch) for batch in loader.epoch(2)) == loader.n_cells


def test_batches_that_are_kept_stay_right(made: Made) -> None:
    for batch in list(stream(made.store, "all", CONFIG, seed=1).epoch(0)):
        check(made, batch)


def test_a_window_of_one_batch(made: Made) -> None:
    loader = stream(made.store, "all", LoaderConfig(batch_size=64, window=64), seed=1)
    assert sum(len(batch) for batch in loader.epoch(0)) == 3000


def test_buffers_are_reused(made: Made) -> None:
    loader = stream(made.store, "all", CONFIG, seed=1)
    places = set()
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            places.add(batch.counts._superbatch.indices.ctypes.data)  # type: ignore[attr-defined]
            del batch
    assert len(places) <= 4  # of 15 windows: two in turn, and those that were too small


def test_an_abandoned_epoch_leaves_no_thread(made: Made) -> None:
    before = set(threading.enumerate())  # a loader of another test may still be reading the first window of an epoch
    batches = stream(made.store, "all", CONFIG, seed=1).epoch(0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [one for one in set(threading.enumerate()) - before if one.name == "scarcade-prefetch"]


def test_the_first_window_of_an_epoch_is_read_before_it_is_asked_for(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second epoch in a row on; whatever is asked for then, the batches are those of a loader of its own."""
    loader, loaded = stream(made.store, "all", CONFIG, seed=1), []
    load = loader.source.load

    def noted(runs: Any, order: Any) -> Any:
        loaded.append(order)
        return load(runs, order)

    monkeypatch.setattr(loader.source, "load", noted)

    def windows_after(epoch: int, start: int = 0) -> int:
        loaded.clear()
        fresh = stream(made.store, "all", CONFIG, seed=1).epoch(epoch, start)
        for one, other in zip(loader.epoch(epoch, start), fresh, strict=True):
            assert np.array_equal(one.rows, other.rows)
            assert torch.equal(one.counts.dense(CPU), other.counts.dense(CPU))
        deadline = time.monotonic() + 10
        while running() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not running()
        return len(loaded)

    def running() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "scarcade-prefetch"]

    n = loader.plan.n_windows
    first = loader.plan.steps // 2
    here = n - loader.plan.window_of(first)
    # a validation comes back to epoch 0 again and again: nothing is read ahead for it
    assert [windows_after(epoch) for epoch in (0, 1, 2, 0, 0)] == [n, n + 1, n, n, n]
    assert windows_after(1, first) == here + 1
    assert windows_after(2) == n
    loader.epoch(3).close()  # type: ignore[attr-defined]
    assert not running()


def test_a_fault_in_a_window_that_was_read_ahead_is_raised_in_its_epoch(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = stream(made.store, "all", CONFIG, seed=1)
    list(loader.epoch(0))
    load, loaded = loader.source.load, []

    def broken(runs: Any, order: Any) -> Any:
        loaded.append(order)
        if len(loaded) > loader.plan.n_windows:
            raise CorruptError("chunk 7")
        return load(runs, order)

    monkeypatch.setattr(loader.source, "load", broken)
    assert sum(len(batch) for batch in loader.epoch(1)) == loader.n_cells
    with pytest.raises(CorruptError, match="chunk 7"):
        next(loader.epoch(2))
    monkeypatch.setattr(loader.source, "load", load)
    assert sum(len(batch) for batch in loader.epoch(2)) == loader.n_cells


def test_a_window_that_would_not_fit_is_smaller(made: Made) -> None:
    per_cell = 4 * made.store.nnz // made.store.n_cells
    small = LoaderConfig(batch_size=64, window=1 << 20, memory=1 << 20)
    plan = stream(made.store, "all", small, seed=1).plan
    assert plan.window == (1 << 20) // (2 * per_cell)
    assert stream(made.store, "all", LoaderConfig(batch_size=64), seed=1).plan.window == 32768


def test_counts_that_take_more_memory_make_a_window_smaller(tmp_path: Path) -> None:
    """Values that are no whole numbers are float32."""
    path, counts = tmp_path / "a.h5ad", ad.AnnData(made_cells(600, 50).astype(np.float32))
    counts.X.data += 0.5
    counts.obs["batch"] = "a"
    counts.write_h5ad(path)
    store = ingest(path, tmp_path / "a.zarr", batch_key="batch", allow_noninteger=True, report=lambda _: None)
    assert store.x_data.dtype == np.float32
    small = LoaderConfig(batch_size=8, window=1 << 20, memory=1 << 20, validation=0)
    per_cell = (store.x_indices.dtype.itemsize + 4) * store.nnz // store.n_cells
    assert stream(store, "all", small, seed=1).plan.window == (1 << 20) // (2 * per_cell)


def test_waiting_is_counted(made: Made) -> None:
    loader = stream(made.store, "all", CONFIG, seed=1)
    assert loader.waited == 0
    list(loader.epoch(0))
    assert loader.waited > 0


def test_fingerprints(made: Made, tmp_path: Path) -> None:
    one = stream(made.store, "train", CONFIG, seed=1).fingerprint()
    assert stream(made.store, "train", CONFIG, seed=2, shard=Shard(1, 2)).fingerprint() == one
    assert stream(made.store, "all", CONFIG, seed=1).fingerprint() != one
    other = make(tmp_path / "other.zarr", seed=5)
    assert stream(other.store, "train", CONFIG, seed=1).fingerprint() != one


def test_more_workers_than_cells_in_a_batch(made: Made) -> None:
    """Every worker still takes every step; some of its batches are empty."""
    config = LoaderConfig(batch_size=2, window=64)
    parts = [list(stream(made.store, "all", config, seed=1, shard=Shard(r, 8)).epoch(0)) for r in range(8)]
    assert {len(part) for part in parts} == {1500}
    assert sum(len(batch) for part in parts for batch in part) == 3000
    empty = next(batch for part in parts for batch in part if len(batch) == 0)
    assert empty.counts.dense(CPU).shape == (0, 50)


def test_what_cannot_be_meant(made: Made) -> None:
    with pytest.raises(UsageError, match="validation split has no cells"):
        stream(made.store, "validation", LoaderConfig(validation=0), seed=0)
    with pytest.raises(UsageError, match="no split 'test'"):
        stream(made.store, "test", LoaderConfig(), seed=0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"--data\.lanes to 16"):
        stream(made.store, "all", LoaderConfig(), seed=0, shard=Shard(9, 16), lanes=8)


def test_faults_on_disk_are_raised_in_the_consumer(tmp_path: Path) -> None:
    made = make(tmp_path / "s.zarr")
    shard = made.store.path / "X" / "data" / "c" / "0"
    content = bytearray(shard.read_bytes())
    loader = stream(made.store, "all", CONFIG, seed=1)
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptError, match=r"X/data: chunk 0 .*crc32c"):
        list(loader.epoch(0))
    shard.unlink()
    with pytest.raises(MissingChunkError, match="X/data/c/0 is missing"):
        list(stream(made.store, "all", CONFIG, seed=1).epoch(0))
    assert not [thread for thread in threading.enumerate() if thread.name == "scarcade-prefetch"]
