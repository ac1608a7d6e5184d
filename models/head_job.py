"""A last layer with its likelihood as a job of a crew (`engine.crew`): products, likelihood and the way back.

What `trained_head` does with torch and the interpreter, in float32, threads do here by themselves, and meet one to
three times. Where cells are few a thread has its own genes of each product and its own cells of the likelihood; else
it has its own cells of all. The last that is made are the gradients of the weights, for which nobody waits on the way
back: with `LATER` they are made by the other threads alone, when the first one has returned.

Like `mmd_kernel` this is compiled with functions of `likelihood_kernel`, and of `engine.blas` and `engine.crew`: after
a change of those, save this file anew. Shapes: B cells, G genes, H hidden units, K rows of a table, T threads.
"""

from typing import Any

import numpy as np
from numba import njit

from scarcade.engine import blas
from scarcade.engine.addresses import doubles_at, numbers_at, places_at, reals_at, rows_at
from scarcade.engine.crew import meet
from scarcade.models import likelihood_kernel as kernel

# What the record says. Addresses and sizes of a batch:
(CREW, THREADS, SGEMM, MKL, BY_CELLS, BLOCK, GRADED, LATER, CELLS, N_GENES, HIDDEN) = range(11)
(INDPTR, GENES, COUNTS, LIBRARY, WEIGHT, FACTORIALS, VALUE, D_LIBRARY) = range(11, 19)
# theta (K, G), the row of each cell; the gradient, (chunks, G) if K is 1, else (T, K, G); and (T, rows, G) to work in
(THETA, N_THETA, THETA_CODE, D_THETA, D_THETA_ROWS) = range(19, 24)
PRODUCTS = 24  # how many, and then of each:
# h (B, H), W (G, H), bias (K, G), the row of each cell; gradients: of a bias of one row (chunks, G), of h (T, B, H) or
# by cells (B, H), of W (G, H) and of the other threads (T - 1, G, H), of the table (1, K, G) or by cells (T, K, G);
# the product (B, G), or by cells (T, BLOCK, G)
(H, W, TABLE, N_TABLE, CODE, D_BIAS, D_H, D_W, D_W_OF_OTHERS, D_TABLE, OUT) = range(11)
EACH = 11
SIZE = PRODUCTS + 1 + 2 * EACH
_REAL = 4  # bytes

# the likelihood is compiled into the job: a function of its own would have other bits from numba's cache
_rows: Any = njit(forceinline=True, error_model="numpy")(kernel.rows.py_func)


@njit(forceinline=True, error_model="numpy")
def _share(n: int, n_threads: int, thread: int) -> tuple[int, int]:
    """The part of a thread, cut between chunks (as `engine.pool.run`)."""
    n_chunks = -(-n // kernel.CHUNK)
    start = min(n, kernel.CHUNK * (n_chunks * thread // n_threads))
    return start, min(n, kernel.CHUNK * (n_chunks * (thread + 1) // n_threads))


@njit(forceinline=True, error_model="numpy")
def _of_weights(record, thread):  # type: ignore[no-untyped-def]
    """The genes of whose weights a thread makes the gradients."""
    n_genes, n_threads = record[N_GENES], record[THREADS]
    if not record[LATER]:
        return _share(n_genes, n_threads, thread)
    if thread == 0:
        return np.int64(0), np.int64(0)
    return _share(n_genes, n_threads - 1, thread - 1)


@njit(forceinline=True, error_model="numpy")
def _of_product(record, p, field):  # type: ignore[no-untyped-def]
    return record[PRODUCTS + 1 + p * EACH + field]


@njit(forceinline=True, error_model="numpy")
def _add_up(target, source, n) -> None:  # type: ignore[no-untyped-def]
    """Adds `n` numbers to others, both given by address."""
    kernel.wide()
    to, more = reals_at(target, n), reals_at(source, n)
    for i in range(n):
        to[i] += more[i]


@njit(forceinline=True, error_model="numpy")
def _add_rows(rows, n, width, first, end, codes, table) -> None:  # type: ignore[no-untyped-def]
    """Adds columns [first, end) of `n` rows to the rows of a table of which the cells are."""
    for b in range(n):
        start = _REAL * first
        _add_up(table + codes[b] * _REAL * width + start, rows + b * _REAL * width + start, end - first)


@njit(forceinline=True, error_model="numpy")
def _likelihood(record, thread, start, stop, logits, dropout) -> None:  # type: ignore[no-untyped-def]
    """Cells [start, stop), whose products lie at the two addresses and become their gradients."""
    n, n_genes, n_all = stop - start, record[N_GENES], record[CELLS]
    chunks, also, n_theta = -(-n_all // kernel.CHUNK), record[PRODUCTS] - 1, record[N_THETA]
    indptr = numbers_at(record[INDPTR] + 8 * start, n + 1)
    n_counts = numbers_at(record[INDPTR], n_all + 1)[n_all]
    # what is not there has no columns, or no rows
    n_tables = _of_product(record, 0, N_TABLE), _of_product(record, also, N_TABLE)
    thetas, d_theta = record[D_THETA], record[D_THETA_ROWS] + _REAL * thread * record[BLOCK] * n_genes
    _rows(
        0, n, start // kernel.CHUNK, indptr, places_at(record[GENES], n_counts), reals_at(record[COUNTS], n_counts),
        rows_at(logits, n, n_genes), rows_at(_of_product(record, 0, TABLE), n_tables[0], n_genes),
        numbers_at(_of_product(record, 0, CODE) + 8 * start, n), reals_at(record[LIBRARY] + _REAL * start, n),
        rows_at(record[THETA], n_theta, n_genes), numbers_at(record[THETA_CODE] + 8 * start, n),
        rows_at(dropout, n, n_genes * also), rows_at(_of_product(record, also, TABLE), n_tables[1], n_genes),
        numbers_at(_of_product(record, also, CODE) + 8 * start, n), reals_at(record[WEIGHT] + _REAL * start, n),
        doubles_at(record[FACTORIALS], kernel.SMALL), reals_at(record[VALUE] + _REAL * start, n),
        reals_at(record[D_LIBRARY] + _REAL * start, n),
        rows_at(thetas if n_theta == 1 else d_theta, chunks if n_theta == 1 else n, n_genes),
        rows_at(_of_product(record, 0, D_BIAS), chunks, n_genes),
        rows_at(_of_product(record, also, D_BIAS), chunks, n_genes),
    )  # fmt: skip
    if n_theta > 1:
        codes = numbers_at(record[THETA_CODE] + 8 * start, n)
        _add_rows(d_theta, n, n_genes, 0, n_genes, codes, thetas + _REAL * thread * n_theta * n_genes)


@njit(forceinline=True, error_model="numpy")
def _by_genes(record, thread, scratch) -> None:  # type: ignore[no-untyped-def]
    n_threads, n_cells, n_genes, hidden = record[THREADS], record[CELLS], record[N_GENES], record[HIDDEN]
    function, row = record[SGEMM], _REAL * n_genes
    first, end = _share(n_genes, n_threads, thread)
    for p in range(record[PRODUCTS]):
        w, out = _of_product(record, p, W) + _REAL * first * hidden, _of_product(record, p, OUT) + _REAL * first
        x = _of_product(record, p, H)
        blas.by_rows(function, x, hidden, w, hidden, n_cells, hidden, end - first, out, n_genes, scratch)
    meet(record[CREW], 0, thread)
    start, stop = _share(n_cells, n_threads, thread)
    if stop > start:
        outs = _of_product(record, 0, OUT), _of_product(record, record[PRODUCTS] - 1, OUT)
        _likelihood(record, thread, start, stop, outs[0] + start * row, outs[1] + start * row)
    meet(record[CREW], 1, thread)
    if not record[GRADED]:
        return
    for p in range(record[PRODUCTS]):
        w, out = _of_product(record, p, W) + _REAL * first * hidden, _of_product(record, p, OUT)
        d_h = _of_product(record, p, D_H) + _REAL * thread * n_cells * hidden
        d = out + _REAL * first
        blas.back(function, d, n_genes, w, hidden, n_cells, hidden, end - first, False, d_h, hidden, scratch)
        if _of_product(record, p, N_TABLE) > 1:
            codes = numbers_at(_of_product(record, p, CODE), n_cells)
            _add_rows(out, n_cells, n_genes, first, end, codes, _of_product(record, p, D_TABLE))
    meet(record[CREW], 2, thread)
    if thread == 0:
        for other in range(1, n_threads):
            n_table = n_cells * hidden
            for p in range(record[PRODUCTS]):
                d_h = _of_product(record, p, D_H)
                _add_up(d_h, d_h + _REAL * other * n_table, n_table)
            _add_up_theta(record, other)
    first, end = _of_weights(record, thread)
    for p in range(record[PRODUCTS]):
        d, d_w = _of_product(record, p, OUT) + _REAL * first, _of_product(record, p, D_W) + _REAL * first * hidden
        x = _of_product(record, p, H)
        blas.outer(function, d, n_genes, x, hidden, n_cells, hidden, end - first, False, d_w, hidden, scratch)


@njit(forceinline=True, error_model="numpy")
def _add_up_theta(record, other) -> None:  # type: ignore[no-untyped-def]
    n = record[N_THETA] * record[N_GENES]
    if record[N_THETA] > 1:
        _add_up(record[D_THETA], record[D_THETA] + _REAL * other * n, n)


@njit(forceinline=True, error_model="numpy")
def _block_back(record, thread, p, start, n, out, adds, scratch) -> None:  # type: ignore[no-untyped-def]
    """What comes back through a product from `n` cells from `start` on, whose gradients lie at `out`."""
    n_genes, hidden, function = record[N_GENES], record[HIDDEN], record[SGEMM]
    x, d_h = _of_product(record, p, H) + _REAL * start * hidden, _of_product(record, p, D_H) + _REAL * start * hidden
    w, d_w = _of_product(record, p, W), _of_product(record, p, D_W)
    if thread > 0:
        d_w = _of_product(record, p, D_W_OF_OTHERS) + _REAL * (thread - 1) * n_genes * hidden
    blas.back(function, out, n_genes, w, hidden, n, hidden, n_genes, False, d_h, hidden, scratch)
    blas.outer(function, out, n_genes, x, hidden, n, hidden, n_genes, adds, d_w, hidden, scratch)
    n_table = _of_product(record, p, N_TABLE)
    if n_table > 1:
        codes = numbers_at(_of_product(record, p, CODE) + 8 * start, n)
        own = _of_product(record, p, D_TABLE) + _REAL * thread * n_table * n_genes
        _add_rows(out, n, n_genes, 0, n_genes, codes, own)


@njit(forceinline=True, error_model="numpy")
def _add_up_tables(record) -> None:  # type: ignore[no-untyped-def]
    """What threads have summed of their own cells, but for the weights."""
    for other in range(1, record[THREADS]):
        _add_up_theta(record, other)
        for p in range(record[PRODUCTS]):
            table, n = _of_product(record, p, D_TABLE), _of_product(record, p, N_TABLE) * record[N_GENES]
            if _of_product(record, p, N_TABLE) > 1:
                _add_up(table, table + _REAL * other * n, n)


@njit(forceinline=True, error_model="numpy")
def _add_up_weights(record, first, end) -> None:  # type: ignore[no-untyped-def]
    """The same of the weights of genes [first, end)."""
    hidden = record[HIDDEN]
    place, n = _REAL * first * hidden, (end - first) * hidden
    for p in range(record[PRODUCTS]):
        for other in range(record[THREADS] - 1):
            others = _of_product(record, p, D_W_OF_OTHERS) + _REAL * other * record[N_GENES] * hidden
            _add_up(_of_product(record, p, D_W) + place, others + place, n)


@njit(forceinline=True, error_model="numpy")
def _by_cells(record, thread, scratch) -> None:  # type: ignore[no-untyped-def]
    n_genes, hidden, most, last = record[N_GENES], record[HIDDEN], record[BLOCK], record[PRODUCTS] - 1
    first, end = _share(record[CELLS], record[THREADS], thread)
    n_chunks, n_blocks = -(-(end - first) // kernel.CHUNK), -(-(end - first) // most)
    place = _REAL * thread * most * n_genes
    for block in range(n_blocks):
        start = first + kernel.CHUNK * (n_chunks * block // n_blocks)
        stop = end if block == n_blocks - 1 else first + kernel.CHUNK * (n_chunks * (block + 1) // n_blocks)
        n = stop - start
        for p in range(last + 1):
            x, w = _of_product(record, p, H) + _REAL * start * hidden, _of_product(record, p, W)
            out = _of_product(record, p, OUT) + place
            blas.by_rows(record[SGEMM], x, hidden, w, hidden, n, hidden, n_genes, out, n_genes, scratch)
        outs = _of_product(record, 0, OUT) + place, _of_product(record, last, OUT) + place
        _likelihood(record, thread, start, stop, outs[0], outs[1])
        for p in range(last + 1 if record[GRADED] else 0):
            _block_back(record, thread, p, start, n, _of_product(record, p, OUT) + place, block > 0, scratch)
    meet(record[CREW], 0, thread)
    if not record[GRADED]:
        return
    if thread == 0:
        _add_up_tables(record)
    first, end = _of_weights(record, thread)
    _add_up_weights(record, first, end)


def job(record_at, thread) -> None:  # type: ignore[no-untyped-def]
    """See above. What `record_at` has is as this file's first lines say."""
    kernel.wide()
    record, kept = numbers_at(record_at, SIZE), np.zeros(blas.SCRATCH, np.int64)
    scratch, before = (kept, np.int64(kept.ctypes.data)), blas.on_threads(record[MKL], 1)
    if record[BY_CELLS]:
        _by_cells(record, thread, scratch)
    else:
        _by_genes(record, thread, scratch)
    blas.on_threads(record[MKL], before)
