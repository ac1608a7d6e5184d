"""Counts without their zeros made dense on a GPU: the kernel of `dataloaders.on_gpu`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl

BLOCK = 256


@triton.jit(do_not_specialize=["first"])
def scatter(indices, data, starts, lengths, first, n_genes, out, BLOCK: tl.constexpr):
    """Put the counts of the cells from `first` on into rows of zeros, float32 (n, n_genes); one program a cell."""
    cell = tl.program_id(0).to(tl.int64)
    start, length = tl.load(starts + first + cell), tl.load(lengths + first + cell)
    for begin in range(0, length, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        there = place < length
        gene = tl.load(indices + start + place, mask=there, other=0).to(tl.int64)
        count = tl.load(data + start + place, mask=there, other=0).to(tl.float32)
        tl.store(out + cell * n_genes + gene, count, mask=there)
