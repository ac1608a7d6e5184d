"""The negative binomial likelihood from the decoder's logits on, on a GPU, as an autograd function.

Two kernels (`likelihood_triton`), one for each way, in place of torch's many passes over (cells x genes). Value
and gradients agree with the formula in float64 to 1e-5 of the largest (tests/models/test_gpu_likelihood.py: on a CPU by
Triton's interpreter, on a GPU where there is one). Nothing is added up by atomics: a run can be repeated to the bit.

Shapes: B cells, G genes, K rows of a table.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scarcade.models.products import added_by_code


def log_p_of(
    x_BG: Tensor,
    logits_BG: Tensor,
    log_library_B: Tensor,
    log_theta: Tensor,
    dropout_BG: Tensor | None,
    code_B: Tensor | None = None,
) -> Tensor:
    """log p of each cell (B,), with mean ``exp(log library) * softmax(logits)``; zinb with dropout logits.

    Args:
        log_theta: (G,), (B, G), or with codes (B,) a table (K, G), which must have them all: nobody looks.
    """
    return _LogP.apply(x_BG, logits_BG, log_library_B, log_theta, dropout_BG, code_B)  # type: ignore[no-any-return, no-untyped-call]


class _LogP(torch.autograd.Function):
    """See `log_p_of`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BG: Tensor,
        logits_BG: Tensor,
        log_library_B: Tensor,
        log_theta: Tensor,
        dropout_BG: Tensor | None,
        code_B: Tensor | None,
    ) -> Tensor:
        from scarcade.models import likelihood_triton as kernel

        given = _given(x_BG, logits_BG, log_library_B, log_theta, dropout_BG, code_B)
        value_B, log_sum_B = torch.empty_like(given[3]), torch.empty_like(given[3])
        kernel.value[_grid(x_BG)](*given, *x_BG.shape, log_sum_B, value_B, **_kinds(log_theta, dropout_BG))
        ctx.save_for_backward(x_BG, logits_BG, log_library_B, log_theta, dropout_BG, code_B, log_sum_B)
        return value_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_B: Tensor) -> tuple[Tensor | None, ...]:
        from scarcade.models import likelihood_triton as kernel

        *saved, log_sum_B = ctx.saved_tensors
        x_BG, logits_BG, _, log_theta, dropout_BG, code_B = saved
        given, shared = _given(*saved), log_theta.dim() == 1
        d_logits_BG = torch.empty_like(logits_BG, memory_format=torch.contiguous_format)
        d_dropout_BG = d_logits_BG if dropout_BG is None else torch.empty_like(d_logits_BG)
        d_library_B = torch.empty_like(given[3])
        d_theta = torch.empty(_grid(x_BG)[0] if shared else len(x_BG), x_BG.shape[1], device=x_BG.device)
        kernel.gradients[_grid(x_BG)](
            *given,
            *x_BG.shape,
            log_sum_B,
            weight_B.contiguous(),
            d_logits_BG,
            d_dropout_BG,
            d_library_B,
            d_theta,
            **_kinds(log_theta, dropout_BG),
        )
        if shared:
            d_theta = d_theta.sum(0)
        elif code_B is not None:  # index_add on a GPU adds in an order of its own each time
            d_theta = added_by_code(d_theta, code_B, len(log_theta))
        return None, d_logits_BG, d_library_B, d_theta, None if dropout_BG is None else d_dropout_BG, None


def _given(
    x_BG: Tensor,
    logits_BG: Tensor,
    log_library_B: Tensor,
    log_theta: Tensor,
    dropout_BG: Tensor | None,
    code_B: Tensor | None,
) -> tuple[Tensor, ...]:
    """What both kernels take first. What is not there is never read; something must stand in its place."""
    logits_BG = logits_BG.contiguous()
    if log_theta.dim() == 1:
        code_B = logits_BG
    elif code_B is None:
        code_B = torch.arange(len(x_BG), device=x_BG.device)
    dropout_BG = logits_BG if dropout_BG is None else dropout_BG.contiguous()
    theta = log_theta.exp().contiguous()
    return x_BG.contiguous(), logits_BG, dropout_BG, log_library_B.contiguous(), theta, code_B.contiguous()


def _kinds(log_theta: Tensor, dropout_BG: Tensor | None) -> dict[str, Any]:
    from scarcade.models import likelihood_triton as kernel

    zinb, shared = dropout_BG is not None, log_theta.dim() == 1
    return {"ZINB": zinb, "SHARED": shared, "ROWS": kernel.ROWS, "BLOCK": kernel.BLOCK}


def _grid(x_BG: Tensor) -> tuple[int]:
    from scarcade.models import likelihood_triton as kernel

    return (-(-len(x_BG) // kernel.ROWS),)
