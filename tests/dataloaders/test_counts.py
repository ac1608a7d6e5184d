import numpy as np
import pytest
import scipy.sparse as sp

from scarcade.dataloaders.counts import (
    Place,
    check_counts,
    check_csr,
    check_indptr,
    checked,
    dense_to_csr,
    raise_to,
    take_rows,
)
from scarcade.engine.errors import CountsError, CsrError
from tests.dataloaders.files import counts

HERE = Place("made.h5ad: layer 'X'", [f"cell{i}" for i in range(100)], [f"g{i}" for i in range(20)])


def parts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    m = counts(100, 20)
    return m.indptr.astype(np.int64), m.indices.copy(), m.data.copy()


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "u2", "i4", "i8", "u8"])
@pytest.mark.parametrize("index", ["u2", "i4", "i8"])
def test_all_types_of_counts_and_indices(kind: str, index: str) -> None:
    indptr, indices, data = parts()
    out = checked(indptr, indices.astype(index), data.clip(0, 100).astype(kind), 20, HERE)
    assert out.data.dtype == np.uint32
    assert np.array_equal(out.data, data.clip(0, 100))
    assert np.array_equal(out.indices, indices)


@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (-1.0, "-1.0"), (1.5, "1.5"), (np.inf, "inf")])
def test_one_bad_value_is_named_by_cell_and_gene(bad: float, shown: str) -> None:
    indptr, indices, data = parts()
    data[indptr[42] + 1] = bad
    gene = indices[indptr[42] + 1]
    with pytest.raises(CountsError, match=rf"1 values are not counts.*\(cell 'cell42', gene 'g{gene}', {shown}"):
        check_counts(indptr, indices, data, HERE)


@pytest.mark.parametrize(("kind", "shown"), [("f8", r"1000000000000\.0"), ("i8", "1000000000000"), ("f4", "9999999")])
def test_whole_numbers_that_are_too_large_are_told_the_limit(kind: str, shown: str) -> None:
    indptr, indices, data = parts()
    data = data.astype(kind)
    data[indptr[42] + 1] = 1e12
    said = rf"1 values are larger than 4,294,967,295, the largest count.*'cell42', gene 'g\d+', ({shown})"
    with pytest.raises(CountsError, match=said):
        check_counts(indptr, indices, data, HERE)
    data[indptr[42]] = -1
    with pytest.raises(CountsError, match="2 values are not counts"):
        check_counts(indptr, indices, data, HERE)


def test_the_first_ten_bad_values_are_shown_and_the_rest_counted() -> None:
    indptr, indices, data = parts()
    with pytest.raises(CountsError) as told:
        check_counts(indptr, indices, data + np.float32(0.5), HERE)
    assert str(told.value).count("(cell ") == 10
    assert f"and {len(data) - 10} more" in str(told.value)


def test_fractions_pass_only_where_they_are_allowed() -> None:
    indptr, indices, data = parts()
    assert check_counts(indptr, indices, data - 7.5, HERE, integer=False).dtype == np.float32
    with pytest.raises(CountsError, match="not finite"):
        check_counts(indptr, indices, data * np.float32(np.nan), HERE, integer=False)
    with pytest.raises(CountsError, match="complex"):
        check_counts(indptr, indices, data.astype(complex), HERE)


@pytest.mark.parametrize(("value", "at"), [(20, 3), (-1, 0), (2**31 - 1, 5)])
def test_a_column_out_of_range(value: int, at: int) -> None:
    indptr, indices, data = parts()
    indices[at] = value
    with pytest.raises(CsrError, match=r"1 gene indices lie outside of 0\.\.19: \(cell 'cell0'"):
        check_csr(indptr, indices, data, 20, HERE)


@pytest.mark.parametrize(("value", "at"), [(-1, 0), (10**12, 100), (0, 50), (-(2**62), 50), (2**62, 50)])
def test_wrong_row_pointers(value: int, at: int) -> None:
    indptr, indices, data = parts()
    indptr[at] = value
    with pytest.raises(CsrError):
        check_csr(indptr, indices, data, 20, HERE)


def test_row_pointers_of_the_wrong_kind() -> None:
    with pytest.raises(CsrError, match="integers"):
        check_indptr(np.zeros(3), 0, 5, HERE)
    with pytest.raises(CsrError):
        check_indptr(np.array([0, 2**63 + 5], np.uint64), 5, 5, HERE)


def test_a_repeated_gene_is_an_error_that_names_it() -> None:
    indptr, indices, data = np.array([0, 3]), np.array([4, 1, 4]), np.ones(3, np.float32)
    with pytest.raises(CsrError, match=r"more than once in a cell.*'cell0', gene 'g4'"):
        check_csr(indptr, indices, data, 20, HERE)


def test_unsorted_rows_are_sorted_and_the_input_is_left_alone() -> None:
    m = counts(100, 20)
    shuffled = m.copy()
    rng = np.random.default_rng(0)
    for row in range(100):
        here = slice(m.indptr[row], m.indptr[row + 1])
        order = rng.permutation(m.indptr[row + 1] - m.indptr[row])
        shuffled.indices[here], shuffled.data[here] = m.indices[here][order], m.data[here][order]
    before = shuffled.indices.copy()
    out = checked(shuffled.indptr, shuffled.indices, shuffled.data, 20, HERE)
    assert np.array_equal(out.indices, m.indices)
    assert np.array_equal(out.data, m.data)
    assert np.array_equal(before, shuffled.indices)


def test_dense_counts_are_found_with_their_nan() -> None:
    values = counts(30, 20).toarray()
    out = dense_to_csr(values, HERE)
    assert np.array_equal(sp.csr_matrix((out.data, out.indices, out.indptr), (30, 20)).toarray(), values)
    values[3, 4] = np.nan
    with pytest.raises(CountsError, match="'cell3', gene 'g4'"):
        dense_to_csr(values, HERE)


def test_take_rows_renames_drops_and_sorts() -> None:
    m = counts(50, 20)
    m.data[::7] = 0  # stored zeros go
    csr = checked(m.indptr, m.indices, m.data, 20, HERE)
    rng = np.random.default_rng(1)
    columns = np.full(20, -1, np.int32)
    columns[rng.permutation(20)[:12]] = rng.permutation(12)
    order = rng.permutation(50)[:30]
    out = take_rows(csr, order, columns, 12)
    wanted = np.zeros((30, 12))
    for gene, column in enumerate(columns):
        if column >= 0:
            wanted[:, column] = m.toarray()[order, gene]
    assert np.array_equal(sp.csr_matrix((out.data, out.indices, out.indptr), (30, 12)).toarray(), wanted)
    assert (out.data > 0).all()
    assert all(np.all(np.diff(out.indices[a:b]) > 0) for a, b in zip(out.indptr, out.indptr[1:], strict=False))


@pytest.mark.parametrize("renamed", ["same", "shifted", "reversed", "some"])
@pytest.mark.parametrize("zeros", [False, True])
def test_take_rows_is_the_same_on_each_of_its_ways_and_gives_the_types_asked_for(renamed: str, zeros: bool) -> None:
    """Rows without zeros and with all genes kept are copied in vectors; the others value by value."""
    matrix = counts(100, 20).astype(np.float32)
    if zeros:
        matrix.data[::7] = 0.0
    columns = {
        "same": np.arange(20),
        "shifted": np.arange(20) + 5,
        "reversed": np.arange(20)[::-1],
        "some": np.where(np.arange(20) % 3 == 0, -1, np.arange(20)),
    }[renamed].astype(np.int32)
    order = np.random.default_rng(0).permutation(100)
    csr = checked(matrix.indptr.astype(np.int64), matrix.indices, matrix.data, 20, HERE)
    out = take_rows(csr, order, columns, 25, index_dtype=np.uint8, value_dtype=np.uint16)
    assert [one.dtype.name for one in (out.indices, out.data, out.indptr)] == ["uint8", "uint16", "int64"]
    expected = np.zeros((100, 25))
    expected[:, columns[columns >= 0]] = matrix.toarray()[order][:, columns >= 0]
    assert (out.data != 0).all()
    assert np.array_equal(sp.csr_matrix((out.data, out.indices, out.indptr), shape=(100, 25)).toarray(), expected)
    assert all(
        (np.diff(out.indices[a:b].astype(int)) > 0).all() for a, b in zip(out.indptr, out.indptr[1:], strict=False)
    )


def test_the_largest_count_of_each_gene() -> None:
    matrix = counts(100, 20).astype(np.float32)
    csr = checked(matrix.indptr.astype(np.int64), matrix.indices, matrix.data, 20, HERE)
    largest = np.full(20, 2.5)
    raise_to(largest, csr)
    assert np.array_equal(largest, np.maximum(matrix.max(axis=0).toarray().ravel(), 2.5))
