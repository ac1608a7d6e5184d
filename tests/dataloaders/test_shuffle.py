"""What lies in a bucket's file comes back, however much of it the system takes at once."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarcade.dataloaders.counts import Csr
from scarcade.dataloaders.shuffle import Dealer, buckets
from scarcade.engine.errors import StorageError

N_CELLS, N_GENES, BITS = 300, 40, 2


def _cells(largest: int) -> tuple[Csr, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, N_GENES, N_CELLS)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    indices = np.concatenate([np.sort(rng.permutation(N_GENES)[:n]) for n in lengths]).astype(np.int32)
    data = rng.integers(1, largest, len(indices)).astype(np.uint32)
    return Csr(indptr, indices, data), rng.integers(0, 1 << 63, N_CELLS, dtype=np.uint64) * np.uint64(2)


def _dealt(folder: Path, csr: Csr, keys: np.ndarray) -> None:
    folder.mkdir()
    np.save(folder / "keys.npy", keys)
    with Dealer(folder, BITS) as dealer:
        for start, stop in ((0, 100), (100, 101), (101, N_CELLS)):
            part = slice(csr.indptr[start], csr.indptr[stop])
            own = Csr(csr.indptr[start : stop + 1] - csr.indptr[start], csr.indices[part], csr.data[part])
            dealer.deal(own, keys[start:stop], np.arange(N_GENES, dtype=np.int32), N_GENES, start)


def _a_byte_less(written: Any) -> Any:
    def writev(handle: int, views: Sequence[memoryview]) -> int:
        return int(written(handle, [b"".join(views)[: max(1, sum(map(len, views)) - 1001)]]))

    return writev


@pytest.mark.parametrize("largest", [200, 70_000], ids=["two bytes", "four bytes"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in pieces"])
def test_cells_come_back_in_the_order_of_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, whole: bool
) -> None:
    csr, keys = _cells(largest)
    if not whole:
        monkeypatch.setattr(os, "writev", _a_byte_less(os.writev))
    _dealt(tmp_path / "file", csr, keys)
    found = list(buckets([tmp_path / "file"], BITS, np.arange(N_GENES, dtype=np.int32), N_GENES, (np.int32, np.uint32)))
    assert len(found) == 1 << BITS
    order = np.concatenate([one.row for one in found])
    assert (order == np.argsort(keys, kind="stable")).all()
    assert (np.concatenate([one.keys for one in found]) == keys[order]).all()
    of_cell = np.repeat(np.arange(N_CELLS), np.diff(csr.indptr))
    for name in ("indices", "data"):
        expected = np.concatenate([getattr(csr, name)[of_cell == cell] for cell in order])
        assert (np.concatenate([getattr(one.csr, name) for one in found]) == expected).all()


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(StorageError, match="No space left"):
        _dealt(tmp_path / "file", *_cells(200))
