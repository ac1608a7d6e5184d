"""Batches of several queries as one: every cell is there, in order, and small steps are filled up."""

import numpy as np
import pytest
import torch

from scarcade.engine.contracts import Batch
from scarcade.engine.joined import LEAST, DenseBuffer, joined
from tests.models.cells import made_batch, made_schema

SCHEMA = made_schema(batches="abc", labels="xy", categorical=("uv",), continuous=1)
CPU = torch.device("cpu")


def parts(*sizes: int) -> list[Batch]:
    return [made_batch(SCHEMA, n, seed=i) for i, n in enumerate(sizes)]


def test_cells_stay_together_and_in_their_order() -> None:
    buffer, given = DenseBuffer(), parts(20, 7, 30)
    batch = joined(given, buffer)
    assert batch.queries == (20, 7, 30)
    assert batch.n_global == len(batch) == 57
    for name in ("batch", "labels", "categorical", "continuous"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(one, name) for one in given]))
    assert np.array_equal(batch.rows, np.concatenate([one.rows for one in given]))
    dense = batch.counts.dense(CPU)
    assert torch.equal(dense, torch.cat([one.counts.dense(CPU) for one in given]))
    for piece, one in zip(batch.each(dense), given, strict=True):
        assert torch.equal(piece, one.counts.dense(CPU))
    indptr, genes, values = batch.counts.csr()
    assert torch.equal(dense[dense != 0], torch.from_numpy(values))
    assert len(indptr) == 58
    assert indptr[-1] == len(genes)


def test_the_buffer_is_used_again() -> None:
    buffer = DenseBuffer()
    first = joined(parts(40, 10), buffer).counts.dense(CPU)
    second = joined(parts(33, 3), buffer).counts.dense(CPU)
    assert first.data_ptr() == second.data_ptr()
    assert joined(parts(60), buffer).counts.dense(CPU).shape == (60, 30)


@pytest.mark.parametrize("n", [1, 5, LEAST - 1])
def test_a_small_step_is_filled_up_with_cells_of_nobody(n: int) -> None:
    given = parts(n)
    batch = joined(given, DenseBuffer())
    assert batch.queries == (n, LEAST - n)
    dense = batch.counts.dense(CPU)
    assert torch.equal(dense[:n], given[0].counts.dense(CPU))
    assert torch.equal(dense[n:], dense[:1].expand(LEAST - n, -1))
    assert batch.batch[n:].eq(0).all()
    assert batch.categorical is not None
    assert batch.categorical[n:].eq(0).all()
    assert batch.labels[n:].eq(-1).all()
    assert len(batch.counts.csr()[0]) == LEAST + 1


def test_a_number_of_each_query_is_spread_over_its_cells() -> None:
    batch = joined(parts(20, 15), DenseBuffer())
    spread = batch.spread([torch.tensor(1.0), torch.tensor(2.0)])
    assert spread.tolist() == [1.0] * 20 + [2.0] * 15
    assert made_batch(SCHEMA, 4).spread([torch.tensor(3.0)]).tolist() == [3.0] * 4
