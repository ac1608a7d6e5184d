"""The 19 Gaussians of the MMD and their slopes for all pairs of cells, on a GPU: one kernel for a tile of pairs.

torch goes over (cells x cells) a hundred times, and its distances by differences alone take ten times as long as the
rest of a training step. What is summed is written by tile and added up afterwards, in an order that is always the same.

Shapes: B cells, D dimensions, C conditions, W Gaussians; a program has OWN cells with OTHER cells.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl

OWN, OTHER = 32, 64


@triton.jit
def pairs(
    z_DB, weight_CC, place_B, factor_W, n_cells, n_dims, n_codes, n_widths, total, slope_BB,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Writes the weighted slopes (B, B), 0 of a cell with itself, and of each tile the sum of the weighted kernel.

    total: float64 (tiles of own cells, tiles of others).
    """
    i = tl.program_id(0) * OWN + tl.arange(0, OWN)
    j = tl.program_id(1) * OTHER + tl.arange(0, OTHER)
    there_i, there_j = i < n_cells, j < n_cells
    distance = tl.zeros((OWN, OTHER), tl.float32)
    for d in range(n_dims):
        own = tl.load(z_DB + d * n_cells + i, mask=there_i, other=0.0)
        other = tl.load(z_DB + d * n_cells + j, mask=there_j, other=0.0)
        # differences and not |a|^2 + |b|^2 - 2ab: the narrowest Gaussian sees distances of 1e-3
        difference = own[:, None] - other[None, :]
        distance += difference * difference
    kernel, slope = tl.zeros((OWN, OTHER), tl.float32), tl.zeros((OWN, OTHER), tl.float32)
    for w in range(n_widths):
        factor = tl.load(factor_W + w)
        part = tl.exp(factor * distance)
        kernel += part
        slope += factor * part
    there = there_i[:, None] & there_j[None, :]
    place_i = tl.load(place_B + i, mask=there_i, other=0)
    place_j = tl.load(place_B + j, mask=there_j, other=0)
    weight = tl.load(weight_CC + place_i[:, None] * n_codes + place_j[None, :], mask=there, other=0.0)
    # what is not there has the distance of a cell to zeros, which is finite where all cells are
    found = tl.where(there, weight * kernel, 0.0).to(tl.float64)
    tl.store(total + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(found, 1), 0))
    slope = tl.where(i[:, None] == j[None, :], 0.0, weight * slope)  # a cell does not move itself
    tl.store(slope_BB + i.to(tl.int64)[:, None] * n_cells + j[None, :], slope, mask=there)
