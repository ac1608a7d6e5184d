"""The random numbers of `engine.philox` on a GPU: the same function of (key, draw, place), compiled by Triton.

Uniform numbers are the same to the bit, normal ones to what logarithm and cosine differ by.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _four(c0, c1, c2, c3, k0, k1):
    """Four 32-bit words of a counter of four and a key of two (Philox4x32-10)."""
    for _ in tl.static_range(10):
        p0_high, p0_low = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        p1_high, p1_low = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1_high ^ c1 ^ k0, p1_low, p0_high ^ c3 ^ k1, p0_low
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _unit(word):
    """Uniform on [0, 1), of the word's upper 24 bits."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _place(lanes, n_lanes, width, at):
    """(first and second word of the key, place within its lane, numbers of the lane) of each number.

    `lanes` are int64: the keys' words (L, 2), then where the lanes begin and end, in cells (L + 1).
    """
    cell = at // width
    lane = tl.zeros_like(at)
    for i in range(1, n_lanes):
        lane += (cell >= tl.load(lanes + 2 * n_lanes + i)).to(at.dtype)
    begin = tl.load(lanes + 2 * n_lanes + lane) * width
    size = tl.load(lanes + 2 * n_lanes + lane + 1) * width - begin
    k0, k1 = tl.load(lanes + 2 * lane).to(tl.uint32), tl.load(lanes + 2 * lane + 1).to(tl.uint32)
    return k0, k1, at - begin, size


@triton.jit(do_not_specialize=["draw"])
def uniform(lanes, n_lanes, width, draw, n, out, BLOCK: tl.constexpr):
    """Uniform numbers on [0, 1): `width` of each cell; a counter's four numbers are a quarter of the lane apart."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # counters, lane behind lane
    lane, counter, begin, size = at * 0, at * 0, at * 0, at * 0
    before = tl.load(lanes + 2 * n_lanes) * 0
    for i in range(n_lanes):
        start = tl.load(lanes + 2 * n_lanes + i) * width
        numbers = tl.load(lanes + 2 * n_lanes + i + 1) * width - start
        here = (at >= before) & (at < before + (numbers + 3) // 4)
        lane, counter = tl.where(here, i, lane), tl.where(here, at - before, counter)
        begin, size = tl.where(here, start, begin), tl.where(here, numbers, size)
        before += (numbers + 3) // 4
    k0, k1 = tl.load(lanes + 2 * lane).to(tl.uint32), tl.load(lanes + 2 * lane + 1).to(tl.uint32)
    number = counter.to(tl.uint32)
    zero = number * 0
    a, b, c, d = _four(number, zero + draw.to(tl.uint32), zero, zero, k0, k1)
    quarter = (size + 3) // 4
    tl.store(out + begin + counter, _unit(a), mask=counter < size)  # of no lane: a size of 0
    tl.store(out + begin + counter + quarter, _unit(b), mask=counter + quarter < size)
    tl.store(out + begin + counter + 2 * quarter, _unit(c), mask=counter + 2 * quarter < size)
    tl.store(out + begin + counter + 3 * quarter, _unit(d), mask=counter + 3 * quarter < size)


@triton.jit(do_not_specialize=["draw"])
def normal(lanes, n_lanes, width, draw, n, out, BLOCK: tl.constexpr):
    """Standard normal numbers (Box and Muller 1958)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k0, k1, place, _ = _place(lanes, n_lanes, width, tl.minimum(at, n - 1))
    word, counter = place % 4, (place // 4).to(tl.uint32)
    zero = counter * 0
    a, b, c, d = _four(counter, zero + draw.to(tl.uint32), zero, zero + 1, k0, k1)
    first, second = tl.where(word < 2, a, c), tl.where(word < 2, b, d)
    # in (0, 1], which has a logarithm
    radius = tl.sqrt(-2.0 * tl.log(_unit(first) + 5.9604644775390625e-08))
    angle = _unit(second) * 6.283185307179586
    tl.store(out + at, radius * tl.where(word % 2 == 0, tl.cos(angle), tl.sin(angle)), mask=at < n)
