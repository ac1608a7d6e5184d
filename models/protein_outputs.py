"""What users ask of a totalVI model: denoised genes and proteins, foreground probabilities.

Proteins that cells were not measured for are imputed by decoding the cells as cells of batches in which they were
(`transform_batch`). Names and conventions are those of scvi-tools 1.4.2.

Shapes: B cells, G genes, P proteins.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scarcade.engine.contracts import Batch, Noise
from scarcade.engine.errors import UsageError
from scarcade.models.distributions import log_normal
from scarcade.models.model import Output, Where
from scarcade.models.sparse import seen

if TYPE_CHECKING:
    from scarcade.models.totalvi import DecodedBoth, Totalvi


def decoded(model: "Totalvi", batch: Batch, noise: Noise | None, where: Where = None) -> list["DecodedBoth"]:
    """Both likelihoods' parameters from one draw of the latent, for each batch of `where`."""
    q = model.encode(seen(batch.counts, model.device), batch)
    z_BL, log_library_B1 = model.draw_latent(q, noise)
    z_BL = model.shape_latent(z_BL)
    return [model.decode(z_BL, log_library_B1, batch, code, noise) for code in model.batch_codes(where)]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean(0) if len(parts) > 1 else parts[0]


@torch.no_grad()
def denoised_proteins(
    model: "Totalvi",
    batch: Batch,
    noise: Noise | None,
    *,
    transform_batch: Where = None,
    include_protein_background: bool = False,
    sample_protein_mixing: bool = False,
    scale_protein: bool = False,
) -> Tensor:
    """Foreground means times the probability of foreground, averaged over batches, (B, P).

    Args:
        include_protein_background: add the background's mean times its probability.
        sample_protein_mixing: draw whether a protein is foreground, in place of its probability (needs `noise`).
        scale_protein: make each cell's values sum to 1.
    """

    def of(p: "DecodedBoth") -> Tensor:
        fore_BP = p.proteins.foreground_BP
        if sample_protein_mixing:
            if noise is None:
                raise UsageError("sample_protein_mixing wants draws of the latent: n_samples=1 or more")
            fore_BP = (noise.uniform(fore_BP.shape[1]) < fore_BP).to(fore_BP.dtype)
        value_BP = p.proteins.rate_fore_BP * fore_BP
        if include_protein_background:
            value_BP = value_BP + p.proteins.rate_back_BP * (1 - fore_BP)
        return value_BP / value_BP.sum(-1, keepdim=True).clamp(min=1e-12) if scale_protein else value_BP

    return _mean([of(p) for p in decoded(model, batch, noise, transform_batch)])


@torch.no_grad()
def foreground_probability(
    model: "Totalvi", batch: Batch, noise: Noise | None, *, transform_batch: Where = None
) -> Tensor:
    """Probability that a protein's counts are more than background, averaged over batches, (B, P)."""
    return _mean([p.proteins.foreground_BP for p in decoded(model, batch, noise, transform_batch)])


@torch.no_grad()
def denoised_genes(
    model: "Totalvi",
    batch: Batch,
    noise: Noise | None,
    *,
    transform_batch: Where = None,
    library_size: float | str = 1.0,
) -> Tensor:
    """Decoded frequencies times `library_size`, or the means of the counts with "latent"; (B, G)."""
    return _mean(
        [
            p.rate_BG if library_size == "latent" else p.scale_BG * float(library_size)
            for p in decoded(model, batch, noise, transform_batch)
        ]
    )


@torch.no_grad()
def background_mean(model: "Totalvi", batch: Batch, noise: Noise | None, *, transform_batch: Where = None) -> Tensor:
    """Mean counts of the background, averaged over batches, (B, P)."""
    return _mean([p.proteins.rate_back_BP for p in decoded(model, batch, noise, transform_batch)])


@torch.no_grad()
def marginal_log_likelihood(model: "Totalvi", batch: Batch, noise: Noise, n_samples: int) -> Tensor:
    """log p(x, y) of each cell by importance sampling of latent, library and background, (B,).

    Proteins that were not measured are left out.
    """
    x = model.counts_seen(batch)
    assert x is not None
    y_BP, measured_BP = model.proteins(batch)
    q = model.encode(x, batch)
    prior_mean_BP, prior_sd_BP = model.background(batch.batch)
    logs = []
    for _ in range(n_samples):
        z_BL, log_library_B1 = model.draw_latent(q, noise)
        p = model.decode(model.shape_latent(z_BL), log_library_B1, batch, noise=noise)
        log_back_BP = p.proteins.rate_back_BP.log()
        proteins_BP = (
            p.proteins.log_likelihood(y_BP)
            + log_normal(log_back_BP, prior_mean_BP, prior_sd_BP**2)
            - log_normal(log_back_BP, p.proteins.back_mean_BP, p.proteins.back_sd_BP**2)
        )
        log_w_B = model.log_likelihood(x, p) + torch.where(measured_BP, proteins_BP, 0.0).sum(-1)
        log_w_B += 0.5 * ((z_BL - q.mean_BL) ** 2 / q.variance_BL + q.variance_BL.log() - z_BL**2).sum(-1)
        if model.library_prior is not None and q.library_variance_B1 is not None:
            mean_K, variance_K = model.library_prior.parts()
            log_prior_B1 = log_normal(log_library_B1, mean_K[batch.batch, None], variance_K[batch.batch, None])
            log_w_B += (log_prior_B1 - log_normal(log_library_B1, q.log_library_B1, q.library_variance_B1))[:, 0]
        logs.append(log_w_B)
    return torch.logsumexp(torch.stack(logs), 0) - math.log(n_samples)


def _genes(model: "Totalvi") -> Sequence[str]:
    return model.schema.genes


def _proteins(model: "Totalvi") -> Sequence[str]:
    return model.schema.proteins


GENES = Output(denoised_genes, _genes, "Denoised expression of genes.", genes=True)
OUTPUTS: Mapping[str, Output] = {
    "expression": GENES,
    "genes": GENES,  # by its older name
    "proteins": Output(denoised_proteins, _proteins, "Denoised proteins, without their background."),
    "foreground": Output(foreground_probability, _proteins, "Probability that a protein is above its background."),
    "background": Output(background_mean, _proteins, "Mean of a protein's background."),
}
"""For `Trained.output`."""
