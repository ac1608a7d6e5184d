"""Products by tiles are those of torch, write where they are told to, and do not depend on what is beside a row."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scarcade.engine import tiles
from scarcade.engine.addresses import numbers_at
from scarcade.engine.crew import can_be_had, crew_of

pytestmark = pytest.mark.skipif(not can_be_had(), reason="there is no crew here")
(WHAT, X, X_ROW, W, W_ROW, D, D_ROW, N, INPUTS, OUTPUTS, ADDS, OUT, OUT_ROW, ROOM) = range(14)
BEFORE = 7.0


def _job(record_at, thread) -> None:  # type: ignore[no-untyped-def]
    r = numbers_at(record_at, ROOM + 1)
    n, i, o, out, row, room = r[N], r[INPUTS], r[OUTPUTS], r[OUT], r[OUT_ROW], r[ROOM]
    if r[WHAT] == 0:
        tiles.by_rows(r[X], r[X_ROW], r[W], r[W_ROW], n, i, o, out, row, room)
    elif r[WHAT] == 1:
        tiles.back(r[D], r[D_ROW], r[W], r[W_ROW], n, i, o, out, row, room)
    else:
        tiles.outer(r[D], r[D_ROW], r[X], r[X_ROW], n, i, o, r[ADDS], out, row, room)


def _found(what: int, x: Tensor, w: Tensor, d: Tensor, *, adds: bool = False, apart: int = 0) -> Tensor:
    """One of the three products, and what lies around it: `apart` numbers more in each row, and a row before and after.

    It is added to, or written over, `BEFORE` everywhere.
    """
    (n, inputs), outputs = x.shape, len(w)
    rows, columns = ((n, outputs), (n, inputs), (outputs, inputs))[what]
    whole = torch.full((rows + 2, columns + apart), BEFORE)
    room = np.empty(tiles.SCRATCH, np.float32)
    wide = [torch.nn.functional.pad(one, (0, apart)) for one in (x, w, d)]
    record = np.zeros(ROOM + 1, np.int64)
    record[X:N] = [number for one in wide for number in (one.data_ptr(), one.shape[1])]
    record[[WHAT, N, INPUTS, OUTPUTS, ADDS, OUT_ROW]] = what, n, inputs, outputs, adds, columns + apart
    record[OUT], record[ROOM] = whole[1:].data_ptr(), room.ctypes.data
    one = crew_of(1)
    one.begin(_job, record, (wide, whole, room))
    one.join()
    return whole


def _of_torch(what: int, x: Tensor, w: Tensor, d: Tensor) -> Tensor:
    products: tuple[Callable[[], Tensor], ...] = (lambda: x @ w.T, lambda: d @ w, lambda: d.T @ x)
    return products[what]()


@pytest.mark.parametrize(("what", "adds"), [(0, False), (1, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    ("n", "inputs", "outputs"),
    [(1, 1, 1), (5, 3, 7), (6, 16, 16), (128, 128, 400), (40, 10, 301), (300, 300, 270), (13, 257, 31), (3, 0, 4)],
)
def test_products_are_those_of_torch(n: int, inputs: int, outputs: int, adds: bool, what: int) -> None:
    torch.manual_seed(0)
    x, w, d = torch.randn(n, inputs), torch.randn(outputs, inputs), torch.randn(n, outputs)
    whole = _found(what, x, w, d, adds=adds, apart=5)
    wanted = _of_torch(what, x.double(), w.double(), d.double()) + BEFORE * adds
    found = whole[1:-1, :-5]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    around = whole.clone()
    around[1:-1, :-5] = BEFORE
    assert (around == BEFORE).all()


@pytest.mark.parametrize("what", [0, 1])
def test_a_row_does_not_depend_on_those_beside_it(what: int) -> None:
    torch.manual_seed(0)
    x, w, d = torch.randn(97, 40), torch.randn(530, 40), torch.randn(97, 530)
    alone = [_found(what, x[i : i + 1], w, d[i : i + 1])[1] for i in range(97)]
    assert torch.equal(torch.stack(alone), _found(what, x, w, d)[1:-1])


def test_what_is_no_number_stays_in_its_row() -> None:
    torch.manual_seed(0)
    x, w, d = torch.randn(20, 33), torch.randn(50, 33), torch.randn(20, 50)
    x[4, 7] = torch.nan
    found = _found(0, x, w, d)[1:-1]
    assert found[4].isnan().all()
    assert found[torch.arange(20) != 4].isfinite().all()
