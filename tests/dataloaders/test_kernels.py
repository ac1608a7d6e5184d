import numpy as np
import pytest
import scipy.sparse as sp

from scarcade.dataloaders import kernels


@pytest.mark.parametrize(
    ("index", "value"), [("uint16", "uint16"), ("uint16", "uint8"), ("uint32", "float32"), ("int32", "float32")]
)
@pytest.mark.parametrize("in_order", [True, False])  # a hint: it changes no number
def test_scatter_and_gather(index: str, value: str, in_order: bool) -> None:
    counts = sp.random(30, 40, density=0.3, format="csr", random_state=0)
    counts.data = np.arange(1, len(counts.data) + 1) % 200 + 1.0
    rows = np.array([3, 3, 29, 0, 17])
    indices, data = counts.indices.astype(index), counts.data.astype(value)
    starts, lengths = counts.indptr[rows].astype(np.int64), np.diff(counts.indptr)[rows].astype(np.int32)
    out = np.full((5, 40), np.nan, np.float32)
    kernels.scatter(indices, data, starts, lengths, in_order, out)
    assert np.array_equal(out, counts[rows].toarray())
    got_indices, got_data = np.empty(lengths.sum(), index), np.empty(lengths.sum(), value)
    kernels.gather(indices, data, starts, lengths, got_indices, got_data)
    assert np.array_equal(got_indices, counts[rows].indices)
    assert np.array_equal(got_data, counts[rows].data)


@pytest.mark.parametrize("genes", [4095, 4096, 4097, 6144, 20_001])
def test_long_rows_are_filled_in_strips(genes: int) -> None:
    counts = sp.random(7, genes, density=0.05, format="csr", random_state=0)
    counts.data = np.ceil(counts.data * 100)
    out = np.full((7, genes), np.nan, np.float32)
    starts, lengths = counts.indptr[:-1].astype(np.int64), np.diff(counts.indptr).astype(np.int32)
    kernels.scatter(counts.indices.astype(np.uint16), counts.data, starts, lengths, True, out)
    assert np.array_equal(out, counts.toarray())
    for row in range(7):  # any order within a cell is right
        np.random.default_rng(row).shuffle(counts.indices[counts.indptr[row] : counts.indptr[row + 1]])
    kernels.scatter(counts.indices.astype(np.uint16), counts.data, starts, lengths, True, out)
    counts.has_sorted_indices = False
    assert np.array_equal(out, counts.toarray())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_deliver(size: int) -> None:
    """Cells of 3, 0, 4 and 2 counts, whose first stands at 2 in the file, to other places, chunk by chunk."""
    indices, data = np.arange(12, dtype=np.uint16), np.arange(12, dtype=np.float32) * 10
    lengths = np.array([3, 0, 4, 2], np.uint16)
    starts, places = np.array([2, 5, 5, 9]), np.array([4, 4, 0, 7])
    out_indices, out_data = np.zeros(9, np.uint16), np.zeros(9, np.float32)
    row = 0
    for begin in range(0, 12, size):
        part = slice(begin, begin + size)
        row = kernels.deliver(indices[part], data[part], begin, row, starts, lengths, places, out_indices, out_data)
    assert row == 4
    assert out_indices.tolist() == [5, 6, 7, 8, 2, 3, 4, 9, 10]
    assert out_data.tolist() == [50, 60, 70, 80, 20, 30, 40, 90, 100]


def test_counts_of_a_cell_are_put_into_the_order_of_their_genes() -> None:
    indices, data = np.array([5, 1, 3, 9, 2, 7, 0], np.uint16), np.arange(7, dtype=np.uint8)
    kernels.sort_cells(indices, data, np.array([0, 4, 4]), np.array([3, 0, 2], np.int32))
    assert indices.tolist() == [1, 3, 5, 9, 2, 7, 0]
    assert data.tolist() == [1, 2, 0, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "float32"])
def test_logs_of_counts_are_looked_up_or_computed(kind: str) -> None:
    counts = np.array([1, 2, 200, 3, 5], kind)
    if kind == "uint32":
        counts[2] = 70_000  # not in the table
    if kind == "float32":
        counts[1] = 2.5
    table = np.log1p(np.arange(8)).astype(np.float32)
    out = np.full((2, 6), 7.0, np.float32)
    starts, lengths = np.array([0, 3]), np.array([3, 2])
    kernels.scatter_log1p(np.array([0, 2, 5, 1, 3], np.uint16), counts, starts, lengths, False, table, out)
    wanted = np.zeros((2, 6))
    wanted[0, [0, 2, 5]], wanted[1, [1, 3]] = np.log1p(counts[:3].astype(float)), np.log1p(counts[3:].astype(float))
    np.testing.assert_allclose(out, wanted, rtol=1e-6)
