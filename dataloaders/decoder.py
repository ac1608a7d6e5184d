"""The cells of a window from the chunks of a store: decoded once, checked, and copied to where they belong.

Where the files lie on a disk of this machine one compiled call reads and decodes all chunks of a window, or of the
share that a thread has of it (`unpacking.take`). Else each range of cells is decoded by itself, chunk by chunk.
"""

import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import numpy as np

from scarcade.dataloaders import kernels
from scarcade.dataloaders.array_layout import CHUNKS_PER_SHARD
from scarcade.dataloaders.chunk_ends import Chunk, ChunkEnds
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.unpacking import Functions, functions, take
from scarcade.engine.errors import CorruptError, StorageError

_PACKED = 1 << 19  # bytes of room for chunks as they lie on the disk
_TRIES = 3  # of a chunk that could not be read, and is found sound
_ENDS = 32  # ranges of a window whose last chunk is kept for the next one

Runs = Sequence[tuple[int, int]]


class Decoder:
    """Decodes ranges of rows of `store`, on as many `threads`. Several streams, each with a thread, may share it."""

    def __init__(self, store: Store, threads: int) -> None:
        self._store, self._threads = store, threads
        self.step = int(store.x_indices.chunk_rows)
        self._ends = ChunkEnds(self.step, store.x_indices.dtype, store.x_data.dtype)
        self._room = threading.local()

    def put(self, runs: Runs, lengths: np.ndarray, places: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Put the counts of the cells of `runs` (lengths int64 (n,)) at their `places` in `indices` and `data`.

        Raises:
            as `ArrayReader.each`.
        """
        rows = np.cumsum([0, *(stop - start for start, stop in runs)])
        before = np.concatenate([[0], np.cumsum(lengths)])
        begins, sizes = np.array([self._store.start_of(start) for start, _ in runs], np.int64), np.diff(before[rows])
        starts = before[:-1] + np.repeat(begins - before[rows[:-1]], np.diff(rows))  # in the store
        firsts = begins // self.step
        lasts = np.where(sizes > 0, -(-(begins + sizes) // self.step), firsts)
        where = starts, lengths, places, indices, data
        found = functions()
        files = None if found is None else self._opened(firsts, lasts)
        if found is not None and files is not None:
            try:
                self._at_once(found, files, firsts, lasts, rows, where)
            finally:
                for file in files[files >= 0].tolist():
                    os.close(file)
            return

        def put(number: int) -> None:
            cells = slice(rows[number], rows[number + 1])
            of_run = starts[cells], lengths[cells], places[cells], indices, data
            self._one_by_one(int(firsts[number]), int(lasts[number]), of_run)

        self._each(put, len(runs))

    def _each(self, work: Callable[[int], None], n: int) -> None:
        if self._threads == 1 or n <= 1:
            for number in range(n):
                work(number)
            return
        shares = [_decoding(self._threads).submit(work, number) for number in range(n)]
        wait(shares)  # also if one fails: the others are at work in files and memory that are let go of behind this
        for share in shares:
            share.result()

    # all chunks in one call

    def _opened(self, firsts: np.ndarray, lasts: np.ndarray) -> np.ndarray | None:
        """Open files of the shards that are wanted, int32 (shards, 2), else -1.

        None if they are not on a disk here, or are more than this process may open.
        """
        both = self._store.x_indices, self._store.x_data
        files = np.full((-(-both[0].n_chunks // CHUNKS_PER_SHARD), 2), -1, np.int32)
        try:
            for shard in both[0].shards(list(zip(firsts.tolist(), lasts.tolist(), strict=True))):
                for place, array in enumerate(both):
                    if (file := array.handle(shard)) is None:
                        raise FileNotFoundError
                    files[shard, place] = file
                    array.table((shard,))
        except BaseException as error:
            for file in files[files >= 0].tolist():
                os.close(file)
            if isinstance(error, FileNotFoundError) or _too_many(error):
                return None
            raise
        return files

    def _at_once(
        self,
        found: Functions,
        files: np.ndarray,
        firsts: np.ndarray,
        lasts: np.ndarray,
        rows: np.ndarray,
        where: tuple[np.ndarray, ...],
    ) -> None:
        """As `put`; chunks of all ranges are counted as one list, of which each thread has as much."""
        taken, kept = self._ends_of(firsts, lasts)
        chunks = np.concatenate([[0], np.cumsum(lasts - firsts)])
        total, threads = int(chunks[-1]), min(self._threads, int(chunks[-1]))
        runs: list[Any] = [chunks, firsts, rows, _addresses(taken), _addresses(kept)]
        table = [files, CHUNKS_PER_SHARD, *self._store.x_indices.table(()), *self._store.x_data.table(())]

        def part(number: int) -> None:
            begin, end = number * total // threads, (number + 1) * total // threads
            scratch = self._ends.fresh()
            try:
                tries = 0
                while tries < _TRIES:
                    given: list[Any] = [*found, begin, end, *runs, _addresses([scratch])[0], *table]
                    given += [*self._packed(), self.step, self._store.n_genes, *where]
                    bad = take(*given)
                    if bad < 0:
                        return
                    run = int(np.searchsorted(chunks, bad, side="right")) - 1
                    chunk = int(firsts[run] + bad - chunks[run])
                    self._look_at(chunk)  # it is sound: what failed was to read it
                    begin, tries = bad, tries + 1 if bad == begin else 1
                raise CorruptError(f"{self._store.where}: X: chunk {chunk} cannot be decoded")
            finally:
                self._ends.free(scratch)

        self._each(part, threads)
        for last, one, other in zip(lasts.tolist(), taken, kept, strict=True):
            if other is not None:
                self._ends.keep(last - 1, other)
            if one is not None and one is not other:
                self._ends.free(one)

    def _ends_of(self, firsts: np.ndarray, lasts: np.ndarray) -> tuple[list[Chunk | None], list[Chunk | None]]:
        """Of each range the first chunk, if it is decoded already, and room for the last, if that is to be kept."""
        taken: list[Chunk | None] = []
        kept: list[Chunk | None] = []
        for number, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True)):
            taken.append(self._ends.taken(first) if first < last else None)
            if first == last or number < len(firsts) - _ENDS:
                kept.append(None)
            elif first == last - 1 and taken[-1] is not None:
                kept.append(taken[-1])  # it is its own last
            else:
                kept.append(self._ends.fresh())
        return taken, kept

    def _packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Room of this thread for chunks as they lie on the disk."""
        found: tuple[np.ndarray, np.ndarray] | None = getattr(self._room, "packed", None)
        if found is None:
            largest = max(_PACKED, self._store.x_indices.largest, self._store.x_data.largest)
            found = self._room.packed = np.empty(largest, np.uint8), np.empty(largest, np.uint8)
        return found

    def _look_at(self, bad: int) -> None:
        """Raise what is wrong with a chunk, if anything is."""
        store, (indices, data) = self._store, self._ends.fresh()
        for _ in store.x_indices.each(bad, bad + 1, indices, below=store.n_genes):
            store.x_data.decode(bad, bad + 1, data)

    # range by range

    def _one_by_one(self, first: int, last: int, where: tuple[np.ndarray, ...]) -> None:
        """The cells of one range, of the chunks [first, last)."""
        if first == last:
            return
        store, row, chunk, begin = self._store, 0, self._ends.taken(first), first
        if chunk is not None:
            row, begin = kernels.deliver(*chunk, first * self.step, row, *where), first + 1
        else:
            chunk = self._ends.fresh()
        both = zip(
            store.x_indices.each(begin, last, chunk[0], below=store.n_genes),
            store.x_data.each(begin, last, chunk[1]),
            strict=True,
        )
        for number, _ in both:
            row = kernels.deliver(*chunk, number * self.step, row, *where)
        self._ends.keep(last - 1, chunk)  # a window ends within a chunk, and the next of its lane begins there


def _too_many(error: BaseException) -> bool:
    """Whether a file could not be opened because others are."""
    cause = error.__cause__ if isinstance(error, StorageError) else error
    return isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)


def _addresses(chunks: Sequence[Chunk | None]) -> np.ndarray:
    """uint64 (n, 2), of none 0."""
    found = [(0, 0) if one is None else tuple(part.__array_interface__["data"][0] for part in one) for one in chunks]
    return np.array(found, np.uint64).reshape(-1, 2)


@cache
def _decoding(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="decoding")


os.register_at_fork(after_in_child=_decoding.cache_clear)  # a forked process has none of these threads
