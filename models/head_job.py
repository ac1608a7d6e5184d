"""A last layer with its likelihood as a job of a crew (`engine.crew`): products, likelihood and the way back.

What `trained_head` does with torch and the interpreter, in float32, threads do here by themselves, and meet one to
three times. Where cells are few a thread has its own genes of each product and its own cells of the likelihood; else
it has its own cells of all. The last that is made are the gradients of the weights, for which nobody waits on the way
back: with `LATER` they are made by the other threads alone, when the first one has returned.

It asks for no memory, which could fail: the others would wait for it for ever (`engine.crew`).
Shapes: B cells, G genes, H hidden units, K rows of a table, T threads.
"""

# compiled with: dc5e821f2528

import numpy as np
from numba import njit

from scarcade.engine import blas, tiles
from scarcade.engine.addresses import array_at, numbers_at, places_at, reals_at
from scarcade.engine.crew import meet
from scarcade.engine.vector_math import APART, wide
from scarcade.models import likelihood_kernel as kernel

# What the record says. Addresses and sizes of a batch, of which MKL's two functions may be 0 (`tiles` is taken then):
(CREW, THREADS, SGEMM, MKL, BY_CELLS, BLOCK, GRADED, LATER, CELLS, N_GENES, HIDDEN) = range(11)
(INDPTR, GENES, COUNTS, LIBRARY, WEIGHT, FACTORIALS, VALUE, D_LIBRARY) = range(11, 19)
# theta (K, G), the row of each cell; the gradient, (chunks, G) if K is 1, else (T, K, G); and (T, rows, G) to work in
(THETA, N_THETA, THETA_CODE, D_THETA, D_THETA_ROWS) = range(19, 24)
MEMORY = 24  # (T, `memory_for`) to work in
PRODUCTS = 25  # how many, and then of each:
# h (B, H), W (G, H), bias (K, G), the row of each cell; gradients: of a bias of one row (chunks, G), of h (T, B, H) or
# by cells (B, H), of W (G, H) and of the other threads (T - 1, G, H), of the table (1, K, G) or by cells (T, K, G);
# the product (B, G), or by cells (T, BLOCK, G)
(H, W, TABLE, N_TABLE, CODE, D_BIAS, D_H, D_W, D_W_OF_OTHERS, D_TABLE, OUT) = range(11)
EACH = 11
SIZE = PRODUCTS + 1 + 2 * EACH
_REAL = 4  # bytes
_NO = np.int64(0)  # no constant for numba, which would compile anew for it

# The likelihood is compiled into the job: a function of its own would have other bits from numba's cache. What is large
# is put in by numba ("always") and not by LLVM, which would compile each of these functions for itself before.


@njit(forceinline=True, error_model="numpy")
def memory_for(n_genes: int) -> int:
    """Numbers of 4 bytes that a thread works in (`_memory`)."""
    return (13 * n_genes + 5 * APART + 5 * kernel.STRIP + 2 * blas.SCRATCH + tiles.SCRATCH + 64) // 16 * 16


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
def _own_memory(record, thread):  # type: ignore[no-untyped-def]
    return record[MEMORY] + _REAL * memory_for(record[N_GENES]) * thread


@njit(forceinline=True, error_model="numpy")
def _of_product(record, p, field):  # type: ignore[no-untyped-def]
    return record[PRODUCTS + 1 + p * EACH + field]


@njit(forceinline=True, error_model="numpy")
def _add_up(target, source, n) -> None:  # type: ignore[no-untyped-def]
    """Adds `n` numbers to others, both given by address."""
    wide()
    to, more = reals_at(target, n), reals_at(source, n)
    for i in range(n):
        to[i] += more[i]


@njit(forceinline=True, error_model="numpy")
def _add_rows(rows, n, width, first, end, codes, table) -> None:  # type: ignore[no-untyped-def]
    """Adds columns [first, end) of `n` rows to the rows of a table of which the cells are."""
    for b in range(n):
        start = _REAL * first
        _add_up(table + codes[b] * _REAL * width + start, rows + b * _REAL * width + start, end - first)


@njit(inline="always", error_model="numpy")
def _memory(record, thread):  # type: ignore[no-untyped-def]
    """That of a thread, cut for `kernel.rows_in`: arrays that are apart there are apart here."""
    n, n_more = record[N_GENES], record[N_GENES] * (record[PRODUCTS] - 1)
    at, far = _own_memory(record, thread) + 8 * blas.SCRATCH + _REAL * tiles.SCRATCH, _REAL * APART
    e, row = at + far, _REAL * n
    t, pi, d_pi, inverse = e + row, e + 2 * row, e + 3 * row, e + 4 * row
    theta, there, places, counts = e + 5 * row, e + 6 * row, e + 7 * row, e + 9 * row + 2 * _REAL
    strips = counts + 2 * row + 2 * _REAL + far
    work = strips + 5 * _REAL * kernel.STRIP + far
    zeros = reals_at(there, n)
    zeros[:] = np.float32(0.0)
    return (
        reals_at(e, n), reals_at(t, n), reals_at(pi, n_more), reals_at(d_pi, n_more), reals_at(inverse, n),
        reals_at(theta, n), zeros, places_at(places, 2, n + 1), reals_at(counts, 2, n + 1),
        reals_at(strips, 5 * kernel.STRIP), reals_at(work, 2, APART + n),
    )  # fmt: skip


@njit(inline="always", error_model="numpy")
def _likelihood(record, thread, start, stop, logits, dropout) -> None:  # type: ignore[no-untyped-def]
    """Cells [start, stop), whose products lie at the two addresses and become their gradients."""
    n, n_genes, n_all = stop - start, record[N_GENES], record[CELLS]
    chunks, also, n_theta = -(-n_all // kernel.CHUNK), record[PRODUCTS] - 1, record[N_THETA]
    indptr = numbers_at(record[INDPTR] + 8 * start, n + 1)
    n_counts = numbers_at(record[INDPTR], n_all + 1)[n_all]
    # what is not there has no columns, or no rows
    n_tables = _of_product(record, 0, N_TABLE), _of_product(record, also, N_TABLE)
    thetas, d_theta = record[D_THETA], record[D_THETA_ROWS] + _REAL * thread * record[BLOCK] * n_genes
    kernel.rows_in(
        _memory(record, thread), 0, n, start // kernel.CHUNK,
        indptr, places_at(record[GENES], n_counts), reals_at(record[COUNTS], n_counts),
        reals_at(logits, n, n_genes), reals_at(_of_product(record, 0, TABLE), n_tables[0], n_genes),
        numbers_at(_of_product(record, 0, CODE) + 8 * start, n), reals_at(record[LIBRARY] + _REAL * start, n),
        reals_at(record[THETA], n_theta, n_genes), numbers_at(record[THETA_CODE] + 8 * start, n),
        reals_at(dropout, n, n_genes * also), reals_at(_of_product(record, also, TABLE), n_tables[1], n_genes),
        numbers_at(_of_product(record, also, CODE) + 8 * start, n), reals_at(record[WEIGHT] + _REAL * start, n),
        array_at(record[FACTORIALS], (kernel.SMALL,), np.float64), reals_at(record[VALUE] + _REAL * start, n),
        reals_at(record[D_LIBRARY] + _REAL * start, n),
        reals_at(thetas if n_theta == 1 else d_theta, chunks if n_theta == 1 else n, n_genes),
        reals_at(_of_product(record, 0, D_BIAS), chunks, n_genes),
        reals_at(_of_product(record, also, D_BIAS), chunks, n_genes),
    )  # fmt: skip
    if n_theta > 1:
        codes = numbers_at(record[THETA_CODE] + 8 * start, n)
        _add_rows(d_theta, n, n_genes, 0, n_genes, codes, thetas + _REAL * thread * n_theta * n_genes)


@njit(forceinline=True, error_model="numpy")
def _multiply(record, p, cells, genes, out, scratch) -> None:  # type: ignore[no-untyped-def]
    """The product of some cells with the weights of some genes, to rows from `out` on."""
    (start, stop), (first, end), n_genes, hidden = cells, genes, record[N_GENES], record[HIDDEN]
    x, w = _of_product(record, p, H) + _REAL * start * hidden, _of_product(record, p, W) + _REAL * first * hidden
    to = out + _REAL * first
    n, outputs = stop - start, end - first
    if record[SGEMM] == 0:
        tiles.by_rows(x, hidden, w, hidden, n, hidden, outputs, to, n_genes, scratch[2])
    else:
        blas.by_rows(record[SGEMM], x, hidden, w, hidden, n, hidden, outputs, to, n_genes, scratch)


@njit(forceinline=True, error_model="numpy")
def _back(record, thread, p, cells, genes, out, scratch) -> None:  # type: ignore[no-untyped-def]
    """What comes back from there to the hidden units, and to the rows of a table."""
    (start, stop), (first, end), n_genes, hidden = cells, genes, record[N_GENES], record[HIDDEN]
    by_cells, n_table = record[BY_CELLS], _of_product(record, p, N_TABLE)
    w, d = _of_product(record, p, W) + _REAL * first * hidden, out + _REAL * first
    d_h = _of_product(record, p, D_H) + _REAL * hidden * (start if by_cells else thread * record[CELLS])
    n, outputs = stop - start, end - first
    if record[SGEMM] == 0:
        tiles.back(d, n_genes, w, hidden, n, hidden, outputs, d_h, hidden, scratch[2])
    else:
        blas.back(record[SGEMM], d, n_genes, w, hidden, n, hidden, outputs, d_h, hidden, scratch)
    if n_table > 1:
        codes = numbers_at(_of_product(record, p, CODE) + 8 * start, stop - start)
        own = _REAL * thread * n_table * n_genes if by_cells else 0
        _add_rows(out, stop - start, n_genes, first, end, codes, _of_product(record, p, D_TABLE) + own)


@njit(forceinline=True, error_model="numpy")
def _weights_back(record, p, cells, genes, out, d_w, adds, scratch) -> None:  # type: ignore[no-untyped-def]
    """And to the weights of the genes, to rows of `d_w` or added to them."""
    (start, stop), (first, end), n_genes, hidden = cells, genes, record[N_GENES], record[HIDDEN]
    x, d, to = _of_product(record, p, H) + _REAL * start * hidden, out + _REAL * first, d_w + _REAL * first * hidden
    n, outputs = stop - start, end - first
    if record[SGEMM] == 0:
        tiles.outer(d, n_genes, x, hidden, n, hidden, outputs, adds, to, hidden, scratch[2])
    else:
        blas.outer(record[SGEMM], d, n_genes, x, hidden, n, hidden, outputs, adds, to, hidden, scratch)


@njit(forceinline=True, error_model="numpy")
def _add_up_parts(record) -> None:  # type: ignore[no-untyped-def]
    """What threads have summed each for itself, but for the weights; into that of the first."""
    n_genes, n_hidden, n_theta = record[N_GENES], record[CELLS] * record[HIDDEN], record[N_THETA] * record[N_GENES]
    for other in range(1, record[THREADS]):
        if record[N_THETA] > 1:
            _add_up(record[D_THETA], record[D_THETA] + _REAL * other * n_theta, n_theta)
        for p in range(record[PRODUCTS]):
            d_h, n = _of_product(record, p, D_H), _of_product(record, p, N_TABLE) * n_genes
            if not record[BY_CELLS]:
                _add_up(d_h, d_h + _REAL * other * n_hidden, n_hidden)
            elif n > n_genes:
                table = _of_product(record, p, D_TABLE)
                _add_up(table, table + _REAL * other * n, n)


@njit(forceinline=True, error_model="numpy")
def _add_up_weights(record, genes) -> None:  # type: ignore[no-untyped-def]
    """The same of the weights of some genes."""
    (first, end), hidden = genes, record[HIDDEN]
    place, n = _REAL * first * hidden, (end - first) * hidden
    for p in range(record[PRODUCTS]):
        for other in range(record[THREADS] - 1):
            others = _of_product(record, p, D_W_OF_OTHERS) + _REAL * other * record[N_GENES] * hidden
            _add_up(_of_product(record, p, D_W) + place, others + place, n)


@njit(forceinline=True, error_model="numpy")
def _own_sums(record, thread, p):  # type: ignore[no-untyped-def]
    """Where a thread adds up what comes back to the weights."""
    if thread == 0:
        return _of_product(record, p, D_W)
    return _of_product(record, p, D_W_OF_OTHERS) + _REAL * (thread - 1) * record[N_GENES] * record[HIDDEN]


@njit(forceinline=True, error_model="numpy")
def _n_blocks(record, n) -> int:  # type: ignore[no-untyped-def]
    return -(-n // record[BLOCK]) if record[BY_CELLS] else 1


@njit(forceinline=True, error_model="numpy")
def _block(own, block, n_blocks):  # type: ignore[no-untyped-def]
    """The cells of a block of a thread's own: whole chunks."""
    n_chunks = -(-(own[1] - own[0]) // kernel.CHUNK)
    start = own[0] + kernel.CHUNK * (n_chunks * block // n_blocks)
    return start, min(own[1], own[0] + kernel.CHUNK * (n_chunks * (block + 1) // n_blocks))


@njit(inline="always", error_model="numpy")
def _compute(record, thread, scratch) -> None:  # type: ignore[no-untyped-def]
    """By cells: block by block of its own, in memory of its own. Else its own genes of all cells, in memory of all."""
    n_genes, n_products, by_cells, every = record[N_GENES], record[PRODUCTS], record[BY_CELLS], np.int64(0)
    own, all_cells, all_genes = _share(record[CELLS], record[THREADS], thread), (every, record[CELLS]), (every, n_genes)
    genes = all_genes if by_cells else _share(n_genes, record[THREADS], thread)
    place, n_blocks = _REAL * thread * record[BLOCK] * n_genes * by_cells, _n_blocks(record, own[1] - own[0])
    for block in range(n_blocks):
        start, stop = _block(own, block, n_blocks)
        cells = (start, stop) if by_cells else all_cells
        for p in range(n_products):
            _multiply(record, p, cells, genes, _of_product(record, p, OUT) + place, scratch)
        if not by_cells:
            meet(record[CREW], 0, thread)
        if stop > start:
            at = place + _REAL * n_genes * (start - cells[0])
            outs = _of_product(record, 0, OUT) + at, _of_product(record, n_products - 1, OUT) + at
            _likelihood(record, thread, start, stop, outs[0], outs[1])
        if not by_cells:
            meet(record[CREW], 1, thread)
        for p in range(n_products * record[GRADED]):
            out = _of_product(record, p, OUT) + place
            _back(record, thread, p, cells, genes, out, scratch)
            if by_cells:
                _weights_back(record, p, cells, genes, out, _own_sums(record, thread, p), np.int64(block > 0), scratch)
    meet(record[CREW], 2, thread)
    if not record[GRADED]:
        return
    if thread == 0:
        _add_up_parts(record)
    genes = _of_weights(record, thread)
    if by_cells:
        _add_up_weights(record, genes)
        return
    for p in range(n_products):
        out, d_w = _of_product(record, p, OUT), _of_product(record, p, D_W)
        _weights_back(record, p, all_cells, genes, out, d_w, _NO, scratch)


def job(record_at, thread) -> None:  # type: ignore[no-untyped-def]
    """See above. What `record_at` has is as this file's first lines say."""
    wide()
    record = numbers_at(record_at, SIZE)
    scratch_at = _own_memory(record, thread)
    scratch = numbers_at(scratch_at, blas.SCRATCH), scratch_at, scratch_at + 8 * blas.SCRATCH
    by_mkl = record[SGEMM] != 0
    before = blas.on_threads(record[MKL], 1) if by_mkl else 0
    _compute(record, thread, scratch)
    if by_mkl:
        blas.on_threads(record[MKL], before)
