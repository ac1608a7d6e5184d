"""The negative binomial likelihood from the decoder's logits on, by a compiled kernel, as an autograd function.

On a CPU the kernel is numba's, here; on a GPU it is Triton's (`gpu_likelihood`).
Sums over cells are kept by chunk of rows (`threads`), so that a result does not depend on the number of threads.
Shapes: B cells, G genes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scarcade.engine.contracts import Counts
from scarcade.engine.errors import UsageError
from scarcade.engine.gpu import compiles_for
from scarcade.engine.pool import run
from scarcade.models import likelihood_kernel as kernel
from scarcade.models.distributions import Family, Path, log_likelihood
from scarcade.models.gpu_likelihood import log_p_of
from scarcade.models.head_product import codes_of
from scarcade.models.products import rows_of
from scarcade.models.sparse import Sparse
from scarcade.models.trained_head import Logits, head_log_likelihood


def _compute(
    x: Sparse,
    logits_BG: Tensor,
    log_library_B: Tensor,
    log_theta: Tensor,
    dropout_BG: Tensor | None,
    code_B: Tensor | None,
    *,
    weight_B: Tensor,
) -> tuple[Tensor, ...]:
    """(log p (B,), and its gradients by logits, log library (B,), log theta (G,) or (B, G), dropout logits)."""
    n_cells, n_genes = logits_BG.shape
    theta = torch.exp(log_theta).reshape(-1, n_genes)
    shared = log_theta.dim() == 1
    if code_B is not None:
        codes = codes_of(code_B, len(theta))
    else:  # one row of theta for all cells, or one for each
        codes = np.zeros(n_cells, np.int64) if shared else np.arange(n_cells)
    value_B, d_library_B = torch.empty_like(log_library_B), torch.empty_like(log_library_B)
    # the kernel writes gradients over logits, to which it would add biases: two rows of none, that it sums none for
    d_logits_BG = logits_BG.clone()
    d_dropout_BG = torch.empty(n_cells, 0) if dropout_BG is None else dropout_BG.clone()
    no_bias, no_codes = np.zeros((2, n_genes), np.float32), np.zeros(n_cells, np.int64)
    d_theta = torch.zeros(-(-n_cells // kernel.CHUNK), n_genes) if len(theta) == 1 else torch.empty_like(logits_BG)
    given = [
        *(x.indptr, x.genes, x.values, d_logits_BG.numpy(), no_bias, no_codes, log_library_B.numpy()),
        *(theta.numpy(), codes, d_dropout_BG.numpy(), no_bias, no_codes, weight_B.numpy(), kernel.LOG_FACTORIAL),
    ]
    found = [value_B.numpy(), d_library_B.numpy(), d_theta.numpy(), no_bias, no_bias]
    run(n_cells, lambda start, stop: kernel.rows(start, stop, 0, *given, *found), chunk=kernel.CHUNK)
    return value_B, d_logits_BG, d_library_B, d_theta.sum(0) if len(theta) == 1 else d_theta, d_dropout_BG


class FusedLikelihood(torch.autograd.Function):
    """(x, logits, log library (B,), log theta, dropout logits or None, codes or None) -> log p of each cell (B,).

    log theta is (G,), (B, G), or with codes (B,) a table (K, G). The gradients are made in the forward pass; that by
    a theta that all cells share for cells of equal weight, as in a mean. Other weights make the pass run again for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | Sparse,
        logits_BG: Tensor,
        log_library_B: Tensor,
        log_theta: Tensor,
        dropout_BG: Tensor | None,
        code_B: Tensor | None = None,
    ) -> Tensor:
        logits_BG, log_library_B, log_theta = (part.contiguous() for part in (logits_BG, log_library_B, log_theta))
        dropout_BG = None if dropout_BG is None else dropout_BG.contiguous()
        ctx.x = Sparse.of(x)
        given = logits_BG, log_library_B, log_theta, dropout_BG, code_B
        value_B, *gradients = _compute(ctx.x, *given, weight_B=torch.ones_like(log_library_B))
        ctx.save_for_backward(*given, *gradients)
        return value_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_B: Tensor) -> tuple[Tensor | None, ...]:
        logits_BG, log_library_B, log_theta, dropout_BG, code_B, *gradients = ctx.saved_tensors
        d_logits_BG, d_library_B, d_theta, d_dropout_BG = gradients
        weight_B1 = weight_B[:, None]
        if not ctx.needs_input_grad[3]:
            d_theta = None
        elif d_theta.dim() == 2:
            d_theta = d_theta * weight_B1
            if code_B is not None:
                d_theta = torch.zeros_like(log_theta).index_add_(0, code_B, d_theta)
        elif len(weight_B) and bool((weight_B == weight_B[0]).all()):
            d_theta = d_theta * weight_B[0]
        else:
            again = _compute(
                ctx.x, logits_BG, log_library_B, log_theta, dropout_BG, code_B, weight_B=weight_B.contiguous()
            )
            d_theta = again[3]
        return (
            None,
            d_logits_BG.mul_(weight_B1),  # made for this pass; torch refuses a second one
            d_library_B * weight_B,
            None if d_theta is None else d_theta.view_as(log_theta),
            None if dropout_BG is None else d_dropout_BG.mul_(weight_B1),
            None,
        )


def why_not(family: str, like: Tensor, *, softplus: bool) -> str | None:
    """Why the kernel cannot compute this likelihood of logits that are made of, or are, `like`; None if it can."""
    if family not in ("nb", "zinb"):
        return f"it knows nb and zinb, and not {family}"
    if softplus:
        return "it takes the softmax of the logits, and size factors want their softplus"
    if like.device.type != "cpu" and not compiles_for(like.device):
        return f"it is for CPUs, and for GPUs that triton compiles for, and the model is on {like.device}"
    if like.dtype != torch.float32:
        return f"it is for float32, and the logits are {like.dtype}"
    return None


def compiles(family: str, weight: Tensor, path: Path, *, softplus: bool = False) -> bool:
    """Whether a CPU's kernel computes the likelihood of the logits that `weight` makes."""
    on_cpu = weight.device.type == "cpu"
    return on_cpu and path in ("auto", "fused") and why_not(family, weight, softplus=softplus) is None


def counts_for(counts: Counts, family: str, weight: Tensor, path: Path, *, softplus: bool = False) -> Tensor | Sparse:
    """Counts (B, G) as this likelihood of logits that `weight` makes takes them: for a CPU's kernel without zeros."""
    if compiles(family, weight, path, softplus=softplus):
        return Sparse.of(counts)
    return counts.dense(weight.device)


def fused(
    x: Tensor | Sparse,
    logits: Tensor | Logits,
    log_size_B: Tensor,
    log_theta: Tensor,
    dropout: Tensor | Logits | None,
    code_B: Tensor | None = None,
) -> Tensor:
    """log p of each cell by the kernel; on a CPU together with the last layer where that is given and trained."""
    if log_size_B.device.type != "cpu":
        assert isinstance(x, Tensor)
        dropout_BG = None if dropout is None else _computed(dropout)
        return log_p_of(x, _computed(logits), log_size_B, log_theta, dropout_BG, code_B)
    if isinstance(logits, Logits) and logits.trained and not isinstance(dropout, Tensor):
        return head_log_likelihood(x, logits, log_size_B, log_theta, dropout, code_B)
    dropout_BG = None if dropout is None else _computed(dropout)
    return FusedLikelihood.apply(x, _computed(logits), log_size_B, log_theta, dropout_BG, code_B)  # type: ignore[no-any-return, no-untyped-call]


def _computed(logits: Tensor | Logits) -> Tensor:
    return logits.tensor() if isinstance(logits, Logits) else logits


def counts_log_likelihood(
    x: Tensor | Sparse,
    logits: Tensor | Logits,
    log_size_B: Tensor,
    log_theta: Tensor,
    dropout: Tensor | Logits | None,
    *,
    code_B: Tensor | None = None,
    path: Path = "auto",
) -> Tensor:
    """log p of each cell (B,): negative binomial with mean exp(log size) * softmax(logits); zinb with dropout logits.

    Logits and dropout logits are given as they are, or as a last layer that is to be computed.

    Args:
        x: counts (B, G), as `counts_for` gives them.
        log_theta: (G,) or (B, G); with `code_B` a table (K, G), of which each cell has the row of its code.

    Raises:
        IndexError: a code that has no row (on a CPU; a GPU does not look).
        UsageError: `path` is "fused" and the kernel cannot compute it.
    """
    family: Family = "nb" if dropout is None else "zinb"
    if path in ("auto", "fused"):
        reason = why_not(family, logits.h_BH if isinstance(logits, Logits) else logits, softplus=False)
        if reason is None:
            return fused(x, logits, log_size_B, log_theta, dropout, code_B)
        if path == "fused":
            raise UsageError(f"--model.likelihood-path fused: the kernel cannot do this: {reason}")
    if isinstance(x, Sparse):
        raise TypeError("counts without their zeros are for the kernel alone")
    if code_B is not None:
        log_theta = rows_of(log_theta, code_B)
    rate_BG = log_size_B.exp()[:, None] * torch.softmax(_computed(logits), -1)
    dropout_BG = None if dropout is None else _computed(dropout)
    return log_likelihood(family, x, rate_BG, log_theta, dropout_BG, path=path)
