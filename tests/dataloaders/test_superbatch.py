import gc
from typing import Any

import numpy as np
import pytest
import torch

from scarcade.dataloaders.on_gpu import OnGpu
from scarcade.dataloaders.packed import DenseRing, PackedCounts
from scarcade.dataloaders.superbatch import BufferPool, Kept, Superbatch, renamed

CPU = torch.device("cpu")


def superbatch() -> Superbatch:
    return Superbatch(
        np.array([0, 2, 1, 0, 1, 2], np.uint16),
        np.array([1, 2, 3, 4, 5, 6], np.uint16),
        starts=np.array([0, 2, 3]),
        lengths=np.array([2, 1, 3], np.int32),
        rows=np.array([7, 8, 9]),
    )


def test_dense_and_csr_say_the_same() -> None:
    counts = PackedCounts(superbatch(), 0, 3, 4, DenseRing())
    expected = [[1, 0, 2, 0], [0, 3, 0, 0], [4, 5, 6, 0]]
    assert counts.shape == (3, 4)
    assert counts.dense(CPU).tolist() == expected
    assert counts.dense(CPU).dtype == torch.float32
    assert counts.unpacked(CPU).tolist() == expected
    indptr, indices, data = counts.csr()
    assert (indptr.tolist(), indices.tolist(), data.tolist()) == ([0, 2, 3, 6], [0, 2, 1, 0, 1, 2], [1, 2, 3, 4, 5, 6])
    assert indptr.dtype == np.int64


def test_what_is_given_to_a_device_is_there_alone() -> None:
    pool = BufferPool(np.dtype(np.uint16), np.dtype(np.uint16))
    given, first = superbatch(), superbatch().csr(0, 3)
    given.indices, given.data = pool.lend(6)
    given.indices[:6], given.data[:6] = superbatch().indices, superbatch().data
    there = given.on(CPU)
    there = given._there = OnGpu(there.indices.clone(), there.data.clone(), there.starts, there.lengths)
    given.give_to(CPU)
    assert len(pool._free) == 1
    assert given.on(CPU) is there
    for mine, theirs in zip(given.csr(0, 3), first, strict=True):
        assert np.array_equal(mine, theirs)
    assert [part.tolist() for part in given.csr(1, 3)] == [[0, 1, 4], [1, 0, 1, 2], [3, 4, 5, 6]]
    assert [part.tolist() for part in given.csr(2, 2)] == [[0], [], []]
    kept = superbatch().of_cells(np.array([2, 0]), Kept())
    kept.give_to(CPU)
    assert kept.csr(0, 1)[2].tolist() == [4, 5, 6]


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_logs_are_those_of_the_dense_counts_in_either_kind_of_number(kind: type) -> None:
    rng = np.random.default_rng(0)
    n_cells, n_genes = 300, 2000  # as many as threads share
    dense = rng.poisson(0.3, (n_cells, n_genes)) * rng.choice([1, 7, 5000], (n_cells, n_genes))  # beyond the table, too
    dense = dense.astype(kind) if kind is np.uint16 else (dense * rng.choice([1, 0.37], dense.shape)).astype(kind)
    cells, genes = np.nonzero(dense)
    lengths = np.bincount(cells, minlength=n_cells).astype(np.int32)
    made = Superbatch(
        genes.astype(np.uint16),
        dense[cells, genes],
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        rows=np.arange(n_cells),
    )
    exact = torch.from_numpy(np.log1p(dense.astype(np.float64)).astype(np.float32))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        counts = PackedCounts(made, 0, n_cells, n_genes, DenseRing())
        assert torch.equal(counts.dense(CPU), torch.from_numpy(dense.astype(np.float32)))
        torch.testing.assert_close(counts.log1p(CPU), exact, rtol=2e-7, atol=0)
        assert torch.equal(counts.log1p(CPU, torch.bfloat16), counts.log1p(CPU).to(torch.bfloat16))
    finally:
        torch.set_num_threads(before)


def test_the_empty_batch() -> None:
    counts = PackedCounts(superbatch(), 1, 1, 4, DenseRing())
    assert counts.dense(CPU).shape == counts.unpacked(CPU).shape == (0, 4)
    assert counts.csr()[0].tolist() == [0]


def test_dense_is_valid_until_the_next_batch_but_one() -> None:
    one, ring = superbatch(), DenseRing()
    batches = [PackedCounts(one, k, k + 1, 4, ring) for k in range(3)]
    first = batches[0].dense(CPU)
    second = batches[1].dense(CPU)
    assert first.tolist() == [[1, 0, 2, 0]]
    assert batches[0].dense(CPU).data_ptr() == first.data_ptr()
    third = batches[2].dense(CPU)
    assert third.data_ptr() == first.data_ptr()
    assert second.tolist() == [[0, 3, 0, 0]]


def test_what_the_consumer_did_to_a_buffer_does_not_last() -> None:
    one, ring = superbatch(), DenseRing()
    for k in range(4):
        dense = PackedCounts(one, 0, 3, 4, ring).dense(CPU)
        assert dense.sum() == 21, k
        dense.add_(1)


def test_buffers_come_back_when_the_last_batch_is_gone() -> None:
    pool = BufferPool(np.dtype(np.uint16), np.dtype(np.uint8))
    pair = pool.lend(100)
    assert [array.dtype.name for array in pair] == ["uint16", "uint8"]
    empty = np.zeros(0, np.int64)
    held = Superbatch(*pair, starts=empty, lengths=empty, rows=empty)
    batch = PackedCounts(held, 0, 0, 4, DenseRing())
    address = pair[0].ctypes.data
    del held, pair
    gc.collect()
    assert pool.lend(50)[0].ctypes.data != address
    del batch
    gc.collect()
    assert pool.lend(100)[0].ctypes.data == address


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_a_lent_buffer_is_large_enough(n: int) -> None:
    pool = BufferPool(np.dtype(np.uint16), np.dtype(np.uint16))
    for _ in range(3):
        pair = pool.lend(n)
        assert len(pair[0]) >= n <= len(pair[1])
        del pair


def test_csr_of_cells_in_order_is_a_view_that_keeps_its_memory_from_being_lent_again() -> None:
    pool = BufferPool(np.dtype(np.uint16), np.dtype(np.uint16))
    indices, data = pool.lend(6)
    indices[:6], data[:6] = [0, 2, 1, 0, 1, 2], [1, 2, 3, 4, 5, 6]
    shape: Any = {"starts": np.array([0, 2, 3]), "lengths": np.array([2, 1, 3], np.int32), "rows": np.array([7, 8, 9])}
    held = Superbatch(indices, data, **shape, in_order=True)
    indptr, genes, values = PackedCounts(held, 1, 3, 4, DenseRing()).csr()
    assert (indptr.tolist(), genes.tolist(), values.tolist()) == ([0, 1, 4], [1, 0, 1, 2], [3, 4, 5, 6])
    assert np.shares_memory(genes, indices)
    assert np.shares_memory(values, data)
    del held, indices, data, genes
    gc.collect()
    other = pool.lend(6)
    other[0][:], other[1][:] = 9, 9
    assert values.tolist() == [3, 4, 5, 6]


def test_genes_that_are_left_out_end_the_order() -> None:
    held = superbatch()
    held.in_order = True
    indptr, genes, values = PackedCounts(renamed(held, np.array([1, -1, 0]), 2), 0, 3, 2, DenseRing()).csr()
    assert (indptr.tolist(), genes.tolist(), values.tolist()) == ([0, 2, 2, 4], [1, 0, 1, 0], [1, 2, 4, 6])
