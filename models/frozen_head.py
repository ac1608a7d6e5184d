"""The last layer of a frozen decoder with its likelihood, as one function of the hidden units.

In surgery nothing but the hidden units has a gradient here: the weights are frozen, and so is theta. So logits,
likelihood and the way back through the weights are done block by block of cells, in memory that stays in the cache and
is used again, and (cells x genes) matrices are never kept for a backward pass. Measured against the layers of `scvi`
with `FusedLikelihood`: see docs/decisions/008.

Shapes: B cells, G genes, H hidden units.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scarcade.engine.contracts import Counts
from scarcade.engine.pool import run
from scarcade.models import frozen_kernel as kernel
from scarcade.models.block_buffers import BlockBuffers
from scarcade.models.layers import Linear
from scarcade.models.products import rows_times_into

BLOCK = 128  # cells of a block: logits of 2,000 genes are 1 MB, half of a core's second cache


@dataclass(frozen=True)
class FrozenHead:
    """Weights of the last layer, of the dropout logits beside it (zinb), and log theta of each gene (G,)."""

    scale: Linear
    dropout: Linear | None
    log_theta_G: Tensor

    def log_p(self, h_BH: Tensor, counts: Counts, log_library_B: Tensor, constant_B: Tensor) -> Tensor:
        """log p of each cell (B,), with a gradient by the hidden units alone.

        Args:
            constant_B: float64, as `constants` gives it.
        """
        return _LogP.apply(h_BH, self, counts, log_library_B, constant_B)  # type: ignore[no-any-return, no-untyped-call]

    def constants(self, counts: Counts) -> Tensor:
        """lnGamma(x + theta) - lnGamma(theta) - ln x!, summed over the genes of each cell; float64 (B,)."""
        indptr, genes, values = counts.csr()
        theta = torch.from_numpy(np.exp(self.log_theta_G.detach().numpy().astype(np.float64))[genes])
        x = torch.from_numpy(values.astype(np.float64))
        parts = (torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1.0)).numpy()
        cells = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        return torch.from_numpy(np.bincount(cells, parts, minlength=len(indptr) - 1))


def why_not(head: FrozenHead) -> str | None:
    """Why the kernel cannot compute this; None if it can."""
    weight = head.scale.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"it is for float32 on CPUs, and the model is {weight.dtype} on {weight.device}"
    trained = [weight, head.log_theta_G, *([] if head.dropout is None else [head.dropout.weight])]
    return "the decoder is trained" if any(one.requires_grad for one in trained) else None


_buffers = BlockBuffers()


def _rows(given: tuple[Any, ...], start: int, stop: int) -> None:
    kernel.rows(start, stop, *given)


class _LogP(torch.autograd.Function):
    """(hidden units, head, counts, log library, constants) -> log p; the gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, h_BH: Tensor, head: FrozenHead, counts: Counts, log_library_B: Tensor, constant_B: Tensor
    ) -> Tensor:
        n_cells, n_genes = len(h_BH), len(head.log_theta_G)
        indptr, genes, values = counts.csr()
        theta_G = head.log_theta_G.exp().numpy()
        library_B, value_B, d_h_BH = log_library_B.exp().numpy(), torch.empty(n_cells), torch.empty_like(h_BH)
        none = np.empty((0, 0), np.float32)
        n_blocks = max(1, n_cells // BLOCK)
        for block in range(n_blocks):
            start, stop = n_cells * block // n_blocks, n_cells * (block + 1) // n_blocks
            h = h_BH[start:stop]
            logits = torch.addmm(
                head.scale.bias, h, head.scale.weight.T, out=_buffers.rows("logits", stop - start, n_genes)
            )
            dropout = None
            if head.dropout is not None:
                dropout = torch.addmm(
                    head.dropout.bias, h, head.dropout.weight.T, out=_buffers.rows("dropout", stop - start, n_genes)
                )
            given = (
                *(indptr[start : stop + 1], genes, values, logits.numpy()),
                none if dropout is None else dropout.numpy(),
                *(library_B[start:stop], constant_B[start:stop].numpy(), theta_G, value_B[start:stop].numpy()),
            )
            run(stop - start, partial(_rows, given))
            rows_times_into(d_h_BH[start:stop], logits, head.scale.weight)
            if dropout is not None and head.dropout is not None:
                rows_times_into(d_h_BH[start:stop], dropout, head.dropout.weight, add=True)
        ctx.save_for_backward(d_h_BH)
        return value_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_B: Tensor) -> tuple[Tensor | None, ...]:
        (d_h_BH,) = ctx.saved_tensors
        return d_h_BH * weight_B[:, None], None, None, None, None
