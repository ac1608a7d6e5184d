"""Products by address are those of torch."""

import numpy as np
import pytest
import torch

from scarcade.engine import blas
from scarcade.engine.addresses import address_of, numbers_at
from scarcade.engine.crew import can_be_had, crew_of
from scarcade.engine.pool import alone

pytestmark = pytest.mark.skipif(blas.functions() is None or not can_be_had(), reason="torch has no MKL here")
(SGEMM, MKL, X, W, D, N, INPUTS, OUTPUTS, FORWARD, BACK, OUTER) = range(11)
SIZE = 11


def _job(record_at, thread) -> None:  # type: ignore[no-untyped-def]
    r, scratch = numbers_at(record_at, SIZE + blas.SCRATCH), numbers_at(record_at + 8 * SIZE, blas.SCRATCH)
    given = scratch, record_at + 8 * SIZE
    n, i, o = r[N], r[INPUTS], r[OUTPUTS]
    before = blas.on_threads(r[MKL], 1)
    blas.by_rows(r[SGEMM], r[X], i, r[W], i, n, i, o, r[FORWARD], o, given)
    blas.back(r[SGEMM], r[D], o, r[W], i, n, i, o, r[BACK], i, given)
    blas.outer(r[SGEMM], r[D], o, r[X], i, n, i, o, False, r[OUTER], i, given)
    blas.outer(r[SGEMM], r[D], o, r[X], i, n, i, o, True, r[OUTER], i, given)
    blas.on_threads(r[MKL], before)


@pytest.mark.parametrize(("n", "inputs", "outputs"), [(1, 1, 1), (5, 3, 7), (128, 128, 2000), (40, 10, 301)])
def test_products_are_those_of_torch(n: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, w, d = torch.randn(n, inputs), torch.randn(outputs, inputs), torch.randn(n, outputs)
    found = torch.empty(n, outputs), torch.empty(n, inputs), torch.empty(outputs, inputs)
    record = np.zeros(SIZE + blas.SCRATCH, np.int64)
    functions = blas.functions()
    assert functions is not None
    record[:SIZE] = (*functions, *(address_of(one) for one in (x, w, d)), n, inputs, outputs, *map(address_of, found))
    one = crew_of(1)
    one.begin(_job, record, found)
    one.join()
    with alone():
        wanted = x @ w.T, d @ w, 2 * (d.T @ x)
    for exact, mine in zip(wanted, found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
