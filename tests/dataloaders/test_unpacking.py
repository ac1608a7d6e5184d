import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarcade.dataloaders import decoder, unpacking
from scarcade.dataloaders.array_reader import ArrayReader
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.sources import Reading, StoreSource
from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.synthetic import simulate
from scarcade.dataloaders.unpacking import functions
from scarcade.engine.errors import CorruptError, CsrError, InputError, MissingChunkError, StorageError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unpacking") / "s.zarr"
    simulate(path, cells=9000, genes=300, library=300.0, seed=0)
    return path


def everything(store: Store) -> tuple[np.ndarray, ...]:
    loader = stream(store, "all", LoaderConfig(batch_size=700, window=2100, validation=0), seed=0)
    parts = [(batch.rows, *batch.counts.csr()[1:]) for batch in loader.epoch(0)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def test_the_compiled_way_is_there_and_gives_the_cells_of_the_other(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert functions() is not None
    compiled = everything(open_store(made))
    monkeypatch.setattr(decoder, "functions", lambda: None)
    assert all(np.array_equal(a, b) for a, b in zip(compiled, everything(open_store(made)), strict=True))


@pytest.mark.parametrize("threads", [1, 3, 64])
def test_any_number_of_threads_gives_the_same_and_leaves_no_file_open(made: Path, threads: int) -> None:
    store = open_store(made)
    alone, others, n = StoreSource(store), StoreSource(store, Reading(threads)), store.n_cells
    rng = np.random.default_rng(0)
    runs = [[(0, n)], [(5, 6)], [(7, 7)], [], [(0, 10), (10, 3000), (2999, 3001), (n - 4, n), (0, 9)]]
    runs += [[(a, a + 1) for a in range(0, n, 40)], [(a, a + 700) for a in range(0, n - 700, 600)]]
    for one in runs * 2:  # the second time with chunks that were kept
        order = rng.permutation(sum(stop - start for start, stop in one))
        open_before = len(os.listdir("/proc/self/fd"))
        first, second = (source.load(one, order).csr(0, len(order)) for source in (alone, others))
        assert len(os.listdir("/proc/self/fd")) <= open_before  # others may be collected meanwhile
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        whole = store.to_anndata().X
        rows = np.concatenate([np.arange(0), *(np.arange(*run) for run in one)])[order].astype(int)
        assert np.array_equal(first[1], whole[rows].indices)
        assert np.array_equal(first[2], whole[rows].data)


@pytest.mark.parametrize("cut", [0, 1, 5000])
def test_a_file_that_was_cut_is_named(made: Path, tmp_path: Path, cut: int) -> None:
    shutil.copytree(made, tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    everything(store)
    file = tmp_path / "s.zarr" / "X" / "data" / "c" / "0"
    with file.open("r+b") as opened:
        opened.truncate(cut)
    with pytest.raises(CorruptError, match=r"X/data/c/0 was cut"):
        everything(store)
    file.unlink()
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MissingChunkError, match=r"X/data/c/0 is missing"):
        everything(store)
    assert len(os.listdir("/proc/self/fd")) <= open_before  # others may be collected meanwhile


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("part", ["indices", "data"])
@pytest.mark.parametrize("at", ["body", "checksum", "length"])
def test_a_damaged_chunk_is_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, part: str, at: str
) -> None:
    if not compiled:
        monkeypatch.setattr(decoder, "functions", lambda: None)
    shutil.copytree(made, tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    reader = store.x_indices if part == "indices" else store.x_data
    number = reader.n_chunks - 2
    offset, length = reader._index(0)[number]
    place = {"body": offset + length // 2, "checksum": offset + length - 1, "length": offset + 4}[at]
    file = tmp_path / "s.zarr" / "X" / part / "c" / "0"
    content = bytearray(file.read_bytes())
    content[int(place)] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(CorruptError, match=rf"X/{part}: chunk {number} \(in X/{part}/c/0\): its checksum"):
        everything(open_store(tmp_path / "s.zarr"))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_gene_beyond_the_last_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(decoder, "functions", lambda: None)
    store = open_store(made)
    store.n_genes = int(store.x_indices.rows(0, len(store.x_indices)).max())  # as if the last gene were not there
    with pytest.raises((CsrError, InputError), match="column index that is not below"):
        everything(store)


def damaged(made: Path, to: Path) -> Store:
    """A store whose first chunk is not sound."""
    shutil.copytree(made, to)
    file = to / "X" / "data" / "c" / "0"
    content = bytearray(file.read_bytes())
    content[int(open_store(to).x_data._index(0)[0, 0]) + 30] ^= 0x55
    file.write_bytes(content)
    return open_store(to)


def test_no_thread_goes_on_behind_the_failure_of_another(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would write to memory that is somebody else's by then."""
    store = damaged(made, tmp_path / "s.zarr")
    running: list[int] = []
    take: Any = unpacking.take

    def slow(*given: Any) -> Any:
        running.append(1)
        if given[3] > 0:  # a share behind the first
            time.sleep(0.05)
        try:
            return take(*given)
        finally:
            running.pop()

    monkeypatch.setattr(decoder, "take", slow)
    source = StoreSource(store, Reading(3))
    for _ in range(3):
        with pytest.raises(CorruptError, match="chunk 0 "):
            source.load([(0, store.n_cells)], np.arange(store.n_cells))
        assert running == []


def test_what_could_not_be_read_once_is_read_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(made)
    take: Any = unpacking.take
    failing = [3, 3, 7]

    def interrupted(*given: Any) -> Any:
        if failing and given[3] <= failing[0] < given[4]:
            take(*given[:4], failing[0], *given[5:])
            return failing.pop(0)
        return take(*given)

    monkeypatch.setattr(decoder, "take", interrupted)
    whole, order = store.to_anndata().X, np.arange(store.n_cells)
    found = StoreSource(store).load([(0, store.n_cells)], order).csr(0, store.n_cells)
    assert failing == []
    assert np.array_equal(found[1], whole.indices)
    assert np.array_equal(found[2], whole.data)
    failing[:] = [2] * 9
    with pytest.raises(CorruptError, match="chunk 2 cannot be decoded"):
        StoreSource(store).load([(0, store.n_cells)], order)


def test_more_files_than_may_be_open_are_read_one_by_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(made)

    def too_many(self: ArrayReader, shard: int) -> int:
        if self.name == "X/data":
            raise StorageError("X/data") from OSError(errno.EMFILE, "Too many open files")
        return handle(self, shard)  # type: ignore[return-value]

    handle = ArrayReader.handle
    monkeypatch.setattr(ArrayReader, "handle", too_many)
    open_before = len(os.listdir("/proc/self/fd"))
    found = StoreSource(store).load([(0, store.n_cells)], np.arange(store.n_cells)).csr(0, store.n_cells)
    assert len(os.listdir("/proc/self/fd")) <= open_before  # others may be collected meanwhile
    assert np.array_equal(found[2], store.to_anndata().X.data)
