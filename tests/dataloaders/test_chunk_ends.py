from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarcade.dataloaders import decoder, unpacking
from scarcade.dataloaders.array_reader import ArrayReader
from scarcade.dataloaders.chunk_ends import ChunkEnds
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.synthetic import simulate

U16 = np.dtype(np.uint16)


def counted(read: Any, seen: list[int]) -> Any:
    """A way of reading that tells which chunks of gene indices it was asked for."""

    def reading(self: ArrayReader, first: int, last: int, *rest: Any, **options: Any) -> Any:
        if self.name == "X/indices":
            seen.extend(range(first, last))
        return read(self, first, last, *rest, **options)

    return reading


def test_a_chunk_that_is_kept_is_taken_once() -> None:
    ends = ChunkEnds(4, U16, U16)
    chunk = ends.fresh()
    ends.keep(7, chunk)
    assert ends.taken(8) is None
    assert ends.taken(7) is chunk
    assert ends.taken(7) is None


def test_the_oldest_of_too_many_is_forgotten_and_its_room_used_again() -> None:
    ends = ChunkEnds(4, U16, U16, most=2)
    chunks = [ends.fresh() for _ in range(3)]
    for number, chunk in enumerate(chunks):
        ends.keep(number, chunk)
    assert [ends.taken(number) for number in range(3)] == [None, *chunks[1:]]
    assert ends.fresh() is chunks[0]


def test_the_same_chunk_kept_twice_stands_once() -> None:
    ends = ChunkEnds(4, U16, U16)
    one, two = ends.fresh(), ends.fresh()
    ends.keep(1, one)
    ends.keep(1, two)
    assert ends.taken(1) is two
    assert ends.fresh() is one


@pytest.mark.parametrize("compiled", [True, False])
def test_the_chunk_at_which_windows_meet_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """In the order of the disk each chunk is wanted by one window, or by two that follow one another."""
    simulate(tmp_path / "s.zarr", cells=6000, genes=300, library=400.0, seed=0)
    store = open_store(tmp_path / "s.zarr")
    if not compiled:
        monkeypatch.setattr(decoder, "functions", lambda: None)
    unpacked: list[int] = []
    monkeypatch.setattr(ArrayReader, "each", counted(ArrayReader.each, unpacked))
    take = unpacking.take

    def taking(crc: int, decode: int, read: int, begin: int, end: int, before: Any, first: Any, *rest: Any) -> int:
        assert (begin, end) == (0, before[-1])  # there is one thread
        for run, taken in enumerate(rest[1]):
            unpacked.extend(first[run] + np.arange(int(taken[0] > 0), before[run + 1] - before[run]))
        return take(crc, decode, read, begin, end, before, first, *rest)

    monkeypatch.setattr(decoder, "take", taking)
    config = LoaderConfig(batch_size=500, window=1000, validation=0)
    loader = stream(store, "all", config, seed=0, lanes=1, shuffle=False)
    found = [batch.counts.csr() for batch in loader.epoch(0)]
    assert len(found) == 12
    assert store.x_indices.n_chunks > 6
    assert unpacked == list(range(store.x_indices.n_chunks))
    whole = store.to_anndata().X
    assert np.array_equal(np.concatenate([genes for _, genes, _ in found]), whole.indices)
    assert np.array_equal(np.concatenate([values for _, _, values in found]), whole.data)
    # and once more, with chunks kept from the end of the last epoch
    again = [batch.counts.csr() for batch in loader.epoch(1)]
    assert all(
        np.array_equal(a, b) for one, two in zip(found, again, strict=True) for a, b in zip(one, two, strict=True)
    )
