"""A uniform shuffle on disk in bounded memory: cells are dealt into buckets by their keys, each bucket is sorted.

A bucket is a range of keys, so the sorted buckets one after another are all cells in the order of their keys. Each
file's cells of one bucket stand in a file of their own, in runs of raw arrays; nothing is held but one bucket.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from scarcade.dataloaders.counts import Csr, take_rows
from scarcade.dataloaders.reused import empty
from scarcade.engine.errors import StorageError

BUCKET = 32 << 20  # bytes of a bucket as it lies on the disk
_MAX_BITS = 9  # 512 buckets: files that are open at once
_HEADER = 4  # int64: cells, values, code of the values' type, code of the indices' type
_ALIGNED = 8  # bytes
_ZEROS = np.zeros(_ALIGNED, np.uint8)
_TYPES = (np.uint16, np.uint32, np.float32, np.int32)


def bits_for(n_values: int, n_cells: int) -> int:
    """How many leading bits of a key choose its bucket."""
    n_bytes = 6 * n_values + 16 * n_cells
    return min(max(0, int(np.ceil(np.log2(max(n_bytes / BUCKET, 1))))), _MAX_BITS)


class Dealer:
    """Context manager: deals the cells of one file out to ``bucket-<number>`` files in `folder`."""

    def __init__(self, folder: Path, bits: int) -> None:
        self._folder, self._bits = folder, bits
        self._stack = ExitStack()

    def __enter__(self) -> "Dealer":
        names = [self._folder / f"bucket-{bucket}" for bucket in range(1 << self._bits)]
        self._files = [self._stack.enter_context(name.open("wb", buffering=0)) for name in names]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def deal(self, csr: Csr, keys: np.ndarray, columns: np.ndarray, n_genes: int, first: int) -> tuple[Csr, np.ndarray]:
        """Write the cells of `csr` (the file's `first` and following) with genes renamed; what was written, in the
        order of buckets, and which row of `csr` each of its rows was."""
        buckets = _bucket(keys, self._bits)
        order = np.argsort(buckets, kind="stable")
        small = csr.data.dtype == np.uint32 and (not len(csr.data) or csr.data.max() <= 0xFFFF)
        kinds = np.uint16 if n_genes <= 1 << 16 else np.int32, np.uint16 if small else csr.data.dtype
        dealt = take_rows(csr, order, columns, n_genes, index_dtype=kinds[0], value_dtype=kinds[1])
        indices, data = dealt.indices, dealt.data
        cuts = np.searchsorted(buckets[order], np.arange((1 << self._bits) + 1))
        rows, lengths = order + first, np.diff(dealt.indptr).astype(np.uint32)
        try:
            for bucket, file in enumerate(self._files):
                start, stop = cuts[bucket], cuts[bucket + 1]
                if start == stop:
                    continue
                values = slice(dealt.indptr[start], dealt.indptr[stop])
                types = [_TYPES.index(data.dtype.type), _TYPES.index(indices.dtype.type)]
                header = np.array([stop - start, values.stop - values.start, *types], np.int64)
                _write(file, (header, rows[start:stop], lengths[start:stop], indices[values], data[values]))
        except OSError as error:
            raise StorageError(f"{self._folder}: the disk did not take the cells ({error})") from error
        return dealt, order


@dataclass(frozen=True)
class Bucket:
    """The cells of one range of keys in the order of their keys."""

    csr: Csr
    keys: np.ndarray  # uint64 (n,)
    source: np.ndarray  # int64 (n,): which file
    row: np.ndarray  # int64 (n,): which cell of it
    repeated: int  # cells whose key is that of the cell before


def buckets(
    folders: list[Path], bits: int, columns: np.ndarray, n_out: int, types: tuple[Any, Any]
) -> Iterator[Bucket]:
    """Every bucket in order, gene g as ``columns[g]`` (-1: left out); the files are removed as they are read.

    Args:
        types: of the gene indices and the counts that are given; they must hold the largest.
    """
    keys_of = [np.load(folder / "keys.npy", mmap_mode="r") for folder in folders]
    for bucket in range(1 << bits):
        runs = [(s, *run) for s, folder in enumerate(folders) for run in _runs(folder / f"bucket-{bucket}")]
        for folder in folders:
            (folder / f"bucket-{bucket}").unlink(missing_ok=True)
        if not runs:
            continue
        source = np.concatenate([np.full(len(rows), s, np.int64) for s, rows, _, _, _ in runs])
        row = np.concatenate([rows for _, rows, _, _, _ in runs])
        indptr = np.zeros(len(row) + 1, np.int64)
        np.cumsum(np.concatenate([lengths for _, _, lengths, _, _ in runs]), out=indptr[1:])
        indices = _joined([part for _, _, _, part, _ in runs])
        data = _joined([part for _, _, _, _, part in runs])
        del runs
        keys = np.empty(len(row), np.uint64)
        for s, known in enumerate(keys_of):
            mine = source == s
            keys[mine] = known[row[mine]]
        order = np.lexsort((row, source, keys))
        csr = Csr(indptr, indices, data)
        repeated = _settle(csr, keys, order)
        taken = take_rows(csr, order, columns, n_out, index_dtype=types[0], value_dtype=types[1])
        yield Bucket(taken, keys[order], source[order], row[order], repeated)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """One behind the other, in the widest type among them."""
    out = empty(sum(len(part) for part in parts), np.result_type(*parts))
    return np.concatenate(parts, out=out)


def _settle(csr: Csr, keys: np.ndarray, order: np.ndarray) -> int:
    """Put cells of one key in the order of their counts, whichever file they came from; the number of such cells."""
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    for start, stop in _stretches(same):
        cells = order[start:stop].copy()

        def content(cell: int) -> bytes:
            values = slice(csr.indptr[cell], csr.indptr[cell + 1])
            # not the type that this bucket happens to have: the order must not depend on what else is in it
            wide = np.float32 if csr.data.dtype.kind == "f" else np.uint32
            return csr.indices[values].astype(np.int32).tobytes() + csr.data[values].astype(wide).tobytes()

        order[start:stop] = sorted(cells, key=content)
    return len(same)


def _stretches(same: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of neighbours i, i + 1 as (start, stop) over the cells that they join."""
    if not len(same):
        return
    breaks = np.flatnonzero(np.diff(same) > 1) + 1
    for run in np.split(same, breaks):
        yield int(run[0]), int(run[-1]) + 2


def _bucket(keys: np.ndarray, bits: int) -> np.ndarray:
    if bits == 0:
        return np.zeros(len(keys), np.uint16)
    return (keys >> np.uint64(64 - bits)).astype(np.uint16)


def _write(file: FileIO, parts: Sequence[np.ndarray]) -> None:
    """Parts one behind the other, each from a multiple of eight bytes on, by one call of the system."""
    views = []
    for part in parts:
        views += [part.view(np.uint8).data, _ZEROS[: -part.nbytes % _ALIGNED].data]
    n_written = os.writev(file.fileno(), views)
    if n_written < sum(len(view) for view in views):
        left = memoryview(b"".join(views))[n_written:]
        while left:
            left = left[file.write(left) :]


def _runs(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(rows, lengths, indices, values) of each run in a bucket file."""
    content, place = empty(path.stat().st_size, np.uint8), 0
    with open(path, "rb") as file:
        if file.readinto(content.data) != len(content):
            raise StorageError(f"{path}: was cut while it was read")

    def take(dtype: Any, n: int) -> np.ndarray:
        nonlocal place
        start, stop = place, place + n * np.dtype(dtype).itemsize
        place = stop + -stop % _ALIGNED
        return content[start:stop].view(dtype)

    while place < len(content):
        n_cells, n_values, value_type, index_type = take(np.int64, _HEADER).tolist()
        yield (
            take(np.int64, n_cells),
            take(np.uint32, n_cells),
            take(_TYPES[index_type], n_values),
            take(_TYPES[value_type], n_values),
        )
