"""What users ask of a trained model, for one batch of cells: expression, samples, likelihoods.

Each is a function of (model, batch, noise); with ``noise=None`` the latent is its mean and not a draw.
Names and conventions are those of scvi-tools 1.4.2. Shapes: B cells, G genes, L latent dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from scarcade.engine.contracts import Batch, Noise, Step
from scarcade.engine.errors import UsageError
from scarcade.models.distributions import log_normal, sample
from scarcade.models.model import AtlasModel, Output, Where
from scarcade.models.sparse import seen

if TYPE_CHECKING:
    from scarcade.models.scvi import Decoded, Scvi

OBSERVED: tuple[int | None, ...] = (None,)
"""Decode every cell as a cell of its own batch."""


def decoded(
    model: "Scvi", batch: Batch, noise: Noise | None, transform_batch: Sequence[int | None] = OBSERVED
) -> "list[Decoded]":
    """The likelihood's parameters from one draw of the latent, decoded in each batch of `transform_batch`."""
    q = model.encode(seen(batch.counts, model.device), batch)
    z_BL, log_library_B1 = model.draw_latent(q, noise)
    return [model.decode(model.shape_latent(z_BL), log_library_B1, batch, code) for code in transform_batch]


@torch.no_grad()
def normalised_expression(
    model: "Scvi",
    batch: Batch,
    noise: Noise | None,
    *,
    transform_batch: Sequence[int | None] = OBSERVED,
    library_size: float | Literal["latent"] = 1.0,
) -> Tensor:
    """Decoded frequencies times `library_size`, or the means of the counts with "latent"; averaged over batches.

    Returns:
        (B, G).
    """
    parts = decoded(model, batch, noise, transform_batch)
    values = [p.rate_BG if library_size == "latent" else p.scale_BG * float(library_size) for p in parts]
    return torch.stack(values).mean(0) if len(values) > 1 else values[0]


@torch.no_grad()
def likelihood_parameters(model: "Scvi", batch: Batch, noise: Noise | None) -> dict[str, Tensor]:
    """``mean``, ``dispersions`` (theta, or the standard deviation of "normal"), ``dropout`` (zinb), each (B, G)."""
    (p,) = decoded(model, batch, noise)
    found = {"mean": p.rate_BG}
    if p.log_theta is not None:
        found["dispersions"] = p.log_theta.exp().expand_as(p.rate_BG)
    if p.dropout_BG is not None:
        found["dropout"] = torch.sigmoid(p.dropout_BG)
    return found


@torch.no_grad()
def predictive_sample(model: "Scvi", batch: Batch, noise: Noise | None, generator: torch.Generator) -> Tensor:
    """One draw of counts from p(x | z), (B, G)."""
    (p,) = decoded(model, batch, noise)
    return sample(model.config.gene_likelihood, p.rate_BG, p.log_theta, p.dropout_BG, generator)


@torch.no_grad()
def loss_terms(model: AtlasModel, batch: Batch, noise: Noise | None) -> dict[str, Tensor]:
    """The terms of the loss with a KL weight of 1, each (B,): "reconstruction", "kl", "elbo" (to be minimised)."""
    return model.losses(batch, Step(), noise).terms


@torch.no_grad()
def marginal_log_likelihood(model: "Scvi", batch: Batch, noise: Noise, n_samples: int) -> Tensor:
    """log p(x) of each cell by importance sampling from the posterior, (B,)."""
    x = model.counts_seen(batch)
    assert x is not None
    q = model.encode(x, batch)
    logs = []
    for _ in range(n_samples):
        z_BL, log_library_B1 = model.draw_latent(q, noise)
        p = model.decode(model.shape_latent(z_BL), log_library_B1, batch)
        log_w_B = model.log_likelihood(x, p)
        # log N(z; 0, 1) - log N(z; m, v): the constants cancel
        log_w_B += 0.5 * ((z_BL - q.mean_BL) ** 2 / q.variance_BL + q.variance_BL.log() - z_BL**2).sum(-1)
        if model.library_prior is not None and q.library_variance_B1 is not None:
            mean_K, variance_K = model.library_prior.parts()
            log_prior_B1 = log_normal(log_library_B1, mean_K[batch.batch, None], variance_K[batch.batch, None])
            log_w_B += (log_prior_B1 - log_normal(log_library_B1, q.log_library_B1, q.library_variance_B1))[:, 0]
        logs.append(log_w_B)
    return torch.logsumexp(torch.stack(logs), 0) - math.log(n_samples)


@torch.no_grad()
def library_size(model: "Scvi", batch: Batch, *, mean: bool = True) -> Tensor:
    """Library size of each cell, (B,): the mean of its log-normal posterior, or exp of the posterior's centre.

    Raises:
        UsageError: the mean of a posterior is asked of a model whose library size is observed.
    """
    q = model.encode(seen(batch.counts, model.device), batch)
    if not mean:
        return q.log_library_B1[:, 0].exp()
    if q.library_variance_B1 is None:
        raise UsageError(
            "the library size of this model is observed, so it has no posterior; give_mean=False returns the "
            "observed one, and use_observed_lib_size=false trains a model that infers it"
        )
    return (q.log_library_B1 + q.library_variance_B1 / 2)[:, 0].exp()


def _expression(
    model: "Scvi", batch: Batch, noise: Noise | None, *, transform_batch: Where = None, library_size: float | str = 1.0
) -> Tensor:
    size: float | Literal["latent"] = "latent" if library_size == "latent" else float(library_size)
    codes = model.batch_codes(transform_batch)
    return normalised_expression(model, batch, noise, transform_batch=codes, library_size=size)


OUTPUTS: Mapping[str, Output] = {
    "expression": Output(
        _expression,
        lambda model: model.schema.genes,
        "Decoded frequencies of genes; library_size=latent: means of their counts.",
        genes=True,
    )
}
"""For `Trained.output`."""
