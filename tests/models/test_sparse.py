"""Counts without their zeros are the counts."""

import numpy as np
import torch

from scarcade.models.sparse import Sparse, totals
from tests.models.cells import made_batch, made_schema


def test_a_matrix_and_back() -> None:
    x = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.5, 0.0]])
    found = Sparse.of(x)
    assert found.indptr.tolist() == [0, 2, 2, 4]
    assert (found.genes.tolist(), found.values.tolist()) == ([1, 3, 0, 2], [2.0, 1.0, 3.0, 0.5])
    torch.testing.assert_close(found.dense(torch.from_numpy(found.values)), x)
    torch.testing.assert_close(found.dense(torch.from_numpy(found.values), room=2)[:, :4], x)
    assert found.of_each(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1, 1, 3, 3]
    assert Sparse.of(found) is found


def test_totals_are_those_of_the_matrix() -> None:
    counts = made_batch(made_schema(), 24).counts
    x = counts.dense(torch.device("cpu"))
    torch.testing.assert_close(totals(Sparse.of(counts)), totals(x))
    torch.testing.assert_close(Sparse.of(counts).dense(torch.from_numpy(Sparse.of(counts).values)), x)
    assert totals(Sparse.of(torch.zeros(3, 4))).tolist() == [0, 0, 0]


def test_a_count_that_is_not_finite_is_of_its_own_cell_alone() -> None:
    x = torch.ones(3, 4)
    x[0, 1], x[1, 2] = torch.inf, torch.nan
    found = totals(Sparse.of(x)).numpy()
    assert np.isinf(found[0])
    assert np.isnan(found[1])
    assert found[2] == 4
