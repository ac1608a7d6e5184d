"""The negative binomial likelihood from the decoder's logits on, on a GPU: the kernels of `models.gpu_likelihood`.

A program takes a few cells through all their genes, block by block: the softmax in a first pass, what is asked for in a
second. Differences that would cancel are multiplied out, so float32 is enough: that of two logarithms of Gamma is that
of Stirling's series term by term, behind eight steps of the recurrence where theta is small. What is summed over cells
is written by program and added up afterwards, in an order that is always the same.

Shapes: B cells, G genes; a program has ROWS cells, and BLOCK genes at a time.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)
ROWS, BLOCK = 2, 512


@triton.jit
def _log1p(r):
    """ln(1 + r) of r >= 0, to the last bits also where r is small."""
    s = r / (2.0 + r)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
    return tl.where(r < 0.5, series, tl.log(1.0 + r))


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def _rest(z):
    """What Stirling's series of log Gamma(z) has behind its first terms, z >= 8."""
    i = 1.0 / z
    q = i * i
    return i * (1 / 12 - q * (1 / 360 - q * (1 / 1260)))


@triton.jit
def _four(z):
    return z * (z + 1.0) * ((z + 2.0) * (z + 3.0))


@triton.jit
def _log_choices(x, theta):
    """log Gamma(x + theta) - log Gamma(theta) - log Gamma(x + 1); 0 where x is 0, to the last bits."""
    small = theta < 8.0
    a = tl.where(small, theta + 8.0, theta)
    b = a + x
    z = x + 9.0
    found = (a - 0.5) * _log1p(x / a) + x * tl.log(b / z) - 8.5 * tl.log(z) + 9.0 - 0.9189385332046727
    found += _rest(b) - _rest(a) - _rest(z)
    # eight steps of each recurrence, the four logarithms of two products each
    theta = tl.where(small, theta, 1.0)
    first = tl.where(small, _four(theta + x) / _four(theta), 1.0) / _four(x + 1.0)
    second = tl.where(small, _four(theta + x + 4.0) / _four(theta + 4.0), 1.0) / _four(x + 5.0)
    return found - tl.log(first) - tl.log(second)


@triton.jit
def _of_two(x, u, v):
    """1 / u - 1 / (u + x) + 1 / v - 1 / (v + x), without the cancelling."""
    first, second = u * (u + x), v * (v + x)
    return x * (first + second) / (first * second)


@triton.jit
def _digamma_difference(x, theta):
    """digamma(x + theta) - digamma(theta); 0 where x is 0."""
    small = theta < 8.0
    a = tl.where(small, theta + 8.0, theta)
    b = a + x
    i, j = 1.0 / a, 1.0 / b
    p, q = i * i, j * j
    series = 0.5 * (i - j) + (p - q) * (1 / 12 - (p + q) * (1 / 120) + (p * p + p * q + q * q) * (1 / 252))
    z = tl.where(small, theta, 1.0)
    # theta may be next to 0, where the product of two steps is not a number: the first goes alone
    steps = x / (z * (z + x)) + x / ((z + 7.0) * (z + 7.0 + x))
    steps += _of_two(x, z + 1.0, z + 2.0) + _of_two(x, z + 3.0, z + 4.0) + _of_two(x, z + 5.0, z + 6.0)
    return _log1p(x / a) + series + tl.where(small, steps, 0.0)


@triton.jit
def _at(row, n_genes, first, BLOCK: tl.constexpr):
    """(places of a block of genes of some cells, the genes, whether they are there)."""
    gene = first + tl.arange(0, BLOCK)
    return row[:, None] * n_genes + gene[None, :], gene, (gene < n_genes)[None, :]


@triton.jit
def value(
    x_BG,
    logits_BG,
    dropout_BG,
    log_library_B,
    theta_KG,
    code_B,
    n_cells,
    n_genes,
    log_sum_B,
    value_B,
    ZINB: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log p of each cell, and the logarithm of the sum of the exponentials of its logits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < n_cells
    row = tl.minimum(row, n_cells - 1)  # beyond the last cell there is nothing: what is found there is not written
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, n_genes, BLOCK):
        at, _, there = _at(row, n_genes, first, BLOCK)
        logit = tl.load(logits_BG + at, mask=there, other=float("-inf"))
        found = tl.maximum(most, tl.max(logit, 1))
        total = total * tl.exp(most - found) + tl.sum(tl.exp(logit - found[:, None]), 1)
        most = found
    log_sum = most + tl.log(total)
    tl.store(log_sum_B + row, log_sum, mask=here)
    library = tl.exp(tl.load(log_library_B + row))
    if not SHARED:
        code = tl.load(code_B + row)
    value = tl.zeros((ROWS,), tl.float32)
    for first in range(0, n_genes, BLOCK):
        at, gene, there = _at(row, n_genes, first, BLOCK)
        x = tl.load(x_BG + at, mask=there, other=0.0)
        logit = tl.load(logits_BG + at, mask=there, other=0.0)
        if SHARED:
            theta = tl.load(theta_KG + gene[None, :], mask=there, other=1.0)
        else:
            theta = tl.load(theta_KG + code[:, None] * n_genes + gene[None, :], mask=there, other=1.0)
        rate = library[:, None] * tl.exp(logit - log_sum[:, None])
        base = theta + EPS
        zero = -theta * _log1p(rate / base)
        more = zero + x * tl.log((rate + EPS) / (base + rate)) + _log_choices(x, theta)
        if ZINB:
            dropout = tl.load(dropout_BG + at, mask=there, other=0.0)
            stays = _softplus(-dropout)
            one = tl.where(x < EPS, _softplus(zero - dropout), more - dropout) - stays
        else:
            one = tl.where(x < EPS, zero, more)
        value += tl.sum(tl.where(there, one, 0.0), 1)
    tl.store(value_B + row, value, mask=here)


@triton.jit
def gradients(
    x_BG,
    logits_BG,
    dropout_BG,
    log_library_B,
    theta_KG,
    code_B,
    n_cells,
    n_genes,
    log_sum_B,
    weight_B,
    d_logits_BG,
    d_dropout_BG,
    d_library_B,
    d_theta,
    ZINB: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the weighted log p by logits, dropout logits, log library, and log theta.

    The last is of each cell (B, G), or of a theta that all share the sum over the cells of each program.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    here = row < n_cells
    row = tl.minimum(row, n_cells - 1)  # as in `value`; its weight is 0
    log_sum = tl.load(log_sum_B + row)
    library = tl.exp(tl.load(log_library_B + row))
    if not SHARED:
        code = tl.load(code_B + row)
    weight = tl.where(here, tl.load(weight_B + row), 0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, n_genes, BLOCK):
        at, gene, there = _at(row, n_genes, first, BLOCK)
        x = tl.load(x_BG + at, mask=there, other=0.0)
        logit = tl.load(logits_BG + at, mask=there, other=0.0)
        if SHARED:
            theta = tl.load(theta_KG + gene[None, :], mask=there, other=1.0)
        else:
            theta = tl.load(theta_KG + code[:, None] * n_genes + gene[None, :], mask=there, other=1.0)
        rate = library[:, None] * tl.exp(logit - log_sum[:, None])
        base = theta + EPS
        sums = base + rate
        log_ratio = _log1p(rate / base)
        t_zero = -rate * theta / sums
        by_theta_zero = theta * (theta / base * rate / sums - log_ratio)
        t_more = theta * (x - rate - EPS) / sums * (rate / (rate + EPS))
        slope = (theta / base * rate - x) / sums - log_ratio + _digamma_difference(x, theta)
        is_zero = x < EPS
        if ZINB:
            dropout = tl.load(dropout_BG + at, mask=there, other=0.0)
            from_nb = _sigmoid(-theta * log_ratio - dropout)  # probability that a zero is one of the negative binomial
            by_dropout = tl.where(is_zero, _sigmoid(-dropout) - from_nb, -_sigmoid(dropout))
            tl.store(d_dropout_BG + at, weight[:, None] * by_dropout, mask=there & here[:, None])
            t_zero = from_nb * t_zero
            by_theta_zero = from_nb * by_theta_zero
        t = tl.where(there, tl.where(is_zero, t_zero, t_more), 0.0)
        by_theta = weight[:, None] * tl.where(there, tl.where(is_zero, by_theta_zero, theta * slope), 0.0)
        total += tl.sum(t, 1)
        tl.store(d_logits_BG + at, t, mask=there & here[:, None])
        if SHARED:
            tl.store(d_theta + program * n_genes + gene, tl.sum(by_theta, 0), mask=gene < n_genes)
        else:
            tl.store(d_theta + at, by_theta, mask=there & here[:, None])
    tl.store(d_library_B + row, weight * total, mask=here)
    tl.debug_barrier()  # what comes now reads what other threads of the program may have written
    for first in range(0, n_genes, BLOCK):
        at, _, there = _at(row, n_genes, first, BLOCK)
        scale = tl.exp(tl.load(logits_BG + at, mask=there, other=0.0) - log_sum[:, None])
        t = tl.load(d_logits_BG + at, mask=there, other=0.0)
        tl.store(d_logits_BG + at, weight[:, None] * (t - scale * total[:, None]), mask=there & here[:, None])
