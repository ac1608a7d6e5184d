"""trVAE: a conditional autoencoder whose conditions are drawn together by an MMD (Lotfollahi et al. 2020).

    loss = reconstruction + w * KL(z) + beta * MMD over the conditions of a batch

As scArches has it (Lotfollahi et al. 2022): the function, the defaults and the first weights' distribution are
those of scArches 0.6.1 (tests/parity); what differs on purpose is in docs/deviations.md. The conditions are the
batches and further categorical covariates; the MMD is between batches.

Shapes: B cells, G genes, K batches, L latent dimensions, H hidden units.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.engine.errors import UsageError
from scarcade.engine.schema import Schema
from scarcade.models.distributions import draw
from scarcade.models.layers import Linear, seeded
from scarcade.models.likelihood import compiles, counts_for, counts_log_likelihood
from scarcade.models.mmd import mmd
from scarcade.models.model import AtlasModel, Output, Where
from scarcade.models.scarches_layers import (
    ScarchesConfig,
    Stack,
    StackEncoder,
    Widths,
    cell_sizes,
    covariate_codes,
    covariate_sizes,
    dispersion_by_batch,
    encoder_input,
    log_normalised,
)
from scarcade.models.sparse import Sparse, seen
from scarcade.models.sparse_product import SeenCounts
from scarcade.models.trained_head import Logits, logits_of


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the decoder says of B cells."""

    logits: Logits  # before the softmax; of mse before the ReLU
    first_BH: Tensor  # output of the first layer
    log_theta_KG: Tensor | None  # of each batch; not of mse
    batch_B: Tensor  # whose dispersion and rows a cell has
    dropout: Logits | None  # logits of an extra zero (zinb)

    @property
    def logits_BG(self) -> Tensor:
        return self.logits.tensor()

    @property
    def dropout_BG(self) -> Tensor | None:
        return None if self.dropout is None else self.dropout.tensor()

    @property
    def scale_BG(self) -> Tensor:
        """Frequencies of the genes, or of mse normalised log expression."""
        return F.relu(self.logits_BG) if self.log_theta_KG is None else torch.softmax(self.logits_BG, -1)


def _expression(
    model: "Trvae", batch: Batch, noise: Noise | None, *, transform_batch: Where = None, library_size: float | str = 1.0
) -> Tensor:
    """Decoded frequencies times `library_size`, or means of the counts with "latent"; of mse log expression, (B, G).

    Raises:
        UsageError: a library size for mse.
    """
    if model.config.recon_loss == "mse" and library_size != 1.0:
        raise UsageError(
            f"library_size {library_size!r}: this model was trained with --model.recon-loss mse, which decodes log "
            f"expression of cells scaled to {model.config.target_sum:g} counts; leave library_size at 1"
        )
    size_B = cell_sizes(seen(batch.counts, model.device), batch, model.schema)
    z_BL = draw(*model.encode(size_B, batch), noise)
    codes = model.batch_codes(transform_batch)
    scale_BG = torch.stack([model.decode(z_BL, batch, transform_batch=code).scale_BG for code in codes]).mean(0)
    return scale_BG * (size_B[:, None] if library_size == "latent" else float(library_size))


class Trvae(AtlasModel):
    """The model. `losses` is the objective; `encode` and `decode` are what all outputs are made of."""

    name: ClassVar[str] = "trvae"
    obsm_key: ClassVar[str] = "X_trVAE"
    recordable: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, Output]] = {
        "expression": Output(
            _expression,
            lambda model: model.schema.genes,
            "Decoded frequencies of genes; of mse log expression.",
            genes=True,
        )
    }

    class Config(ScarchesConfig):
        """Architecture and loss of trVAE. Defaults are those of scArches."""

        hidden_layer_sizes: Widths = Field((256, 64), description="units of the encoder's layers; the decoder mirrors")
        n_latent: int = Field(10, ge=1, le=4096, description="dimensions of the latent space")
        recon_loss: Literal["nb", "zinb", "mse"] = Field(
            "nb", description="distribution of counts, or squared error of normalised log counts"
        )
        use_mmd: bool = Field(True, description="draw conditions together")
        mmd_on: Literal["z", "y"] = Field("z", description="on the latent (z) or the decoder's first layer (y)")
        mmd_boundary: int | None = Field(
            None, ge=1, description="compare only batches before it with those from it on; default: all pairs"
        )
        beta: float = Field(1.0, ge=0, description="weight of the MMD; more mixes more")

    def __init__(self, config: Config, schema: Schema, *, seed: int = 0) -> None:
        super().__init__(config, schema, seed=seed)
        if config.likelihood_path == "fused" and config.recon_loss == "mse":
            raise UsageError(
                "--model.likelihood-path fused: the kernel computes likelihoods of counts, and not --model.recon-loss "
                "mse; leave it at auto"
            )
        generator = seeded("trvae", seed)
        sizes, genes = covariate_sizes(schema, self.name), schema.n_genes
        hidden = config.hidden_layer_sizes
        trunk = Stack((genes, *hidden), sizes, config, generator, bias=True)
        self.encoder = StackEncoder(trunk, hidden[-1], config.n_latent, generator)
        self.decoder = Stack((config.n_latent, *hidden[::-1]), sizes, config, generator, bias=False)
        self.scale = Linear(hidden[0], genes, generator)
        self.dropout = Linear(hidden[0], genes, generator) if config.recon_loss == "zinb" else None
        self.theta = None if config.recon_loss == "mse" else dispersion_by_batch(schema, generator)

    @classmethod
    def training_defaults(cls, n_cells: int, *, started: bool = False) -> Mapping[str, Any]:
        """As scArches trains it: a full KL weight from the start, weights that decay, batches met equally often."""
        return {"optim": {"weight_decay": 0.04, "kl_epochs": 0.0}, "data": {"stratify": True}}

    @classmethod
    def query_defaults(cls) -> Mapping[str, Any]:
        """As in training: a full KL weight from the start, batches met equally often."""
        return {"optim": {"kl_epochs": 0.0}, "data": {"stratify": True}}

    @property
    def data_notice(self) -> str | None:
        if not self.config.use_mmd:
            return None
        n, boundary = len(self.schema.batch), self.config.mmd_boundary
        if n == 1:
            return f"all cells are of one batch in '{self.schema.batch.name}': the MMD has nothing to compare"
        if boundary is not None and boundary >= n:
            return f"--model.mmd-boundary {boundary}: there are {n} batches, so the MMD compares nothing"
        return None

    @property
    def couples(self) -> str | None:
        if not self.config.use_mmd or self.config.mmd_boundary is None:
            return None
        return "its MMD tells batches apart by their place (--model.mmd-boundary)"

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        """Reconstruction and KL of each cell, and the MMD of the batch as penalty (scArches' trVAE.forward).

        With `noise=None` latents are their means. The term "elbo" is the negative ELBO with w = 1, without the MMD.
        """
        x = self.counts_seen(batch)
        size_B = cell_sizes(x, batch, self.schema)
        seen_BG, product_BH = self._seen_or_known(size_B, batch, x)
        z_BL, kl_B = self.encoder.latent(seen_BG, covariate_codes(batch), noise, product_BH)[2:]
        p = self.decode(z_BL, batch, noise=noise)

        reconstruction_B = self.reconstruction(x, size_B, p)
        terms = {"reconstruction": reconstruction_B, "kl": kl_B, "elbo": reconstruction_B + kl_B}
        penalty: Tensor | None = None
        if self.config.use_mmd:
            on_BD = z_BL if self.config.mmd_on == "z" else p.first_BH
            pairs = list(zip(batch.each(on_BD), batch.each(batch.batch), strict=True))
            n, boundary = len(self.schema.batch), self.config.mmd_boundary
            each = [self.config.beta * mmd(on, code, boundary, n) for on, code in pairs]
            penalty = torch.stack(each).sum()
            terms["mmd"] = batch.spread(each)
        return Losses(reconstruction_B + step.kl_weight * kl_B, terms, penalty)

    def counts_seen(self, batch: Batch) -> Tensor | Sparse:
        """Counts (B, G) as the likelihood takes them."""
        return counts_for(batch.counts, self.config.recon_loss, self.scale.weight, self.config.likelihood_path)

    @property
    def compiled(self) -> bool:
        """As of `AtlasModel`."""
        return compiles(self.config.recon_loss, self.scale.weight, self.config.likelihood_path)

    def encode(
        self, size_B: Tensor, batch: Batch, noise: Noise | None = None, x: Tensor | Sparse | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent; `noise` is used for dropout, in training mode only."""
        seen_BG, product_BH = self._seen_or_known(size_B, batch, x)
        mean_BL, variance_BL = self.encoder(seen_BG, covariate_codes(batch), noise, product_BH)
        return mean_BL, variance_BL

    def decode(
        self, z_BL: Tensor, batch: Batch, *, transform_batch: int | None = None, noise: Noise | None = None
    ) -> Decoded:
        """The likelihood's parameters; with `transform_batch` as if every cell were of that batch."""
        codes = covariate_codes(batch)
        if transform_batch is not None:
            codes["batch"] = torch.full_like(batch.batch, transform_batch)
        first_BH = self.decoder.after_first(z_BL, codes, noise)
        h_BH = self.decoder.rest(first_BH, noise)
        log_theta_KG = None if self.theta is None else self.theta.table()
        dropout = None if self.dropout is None else logits_of(self.dropout, h_BH, codes)
        return Decoded(logits_of(self.scale, h_BH, codes), first_BH, log_theta_KG, codes["batch"], dropout)

    def reconstruction(self, x: Tensor | Sparse, size_B: Tensor, p: Decoded) -> Tensor:
        """-log p(x | z), or the squared error, summed over genes, (B,)."""
        if p.log_theta_KG is None:
            assert isinstance(x, Tensor)
            return (p.scale_BG - log_normalised(x, size_B, self.config.target_sum)).square().sum(-1)
        return -counts_log_likelihood(
            x,
            p.logits,
            size_B.log(),
            p.log_theta_KG,
            p.dropout,
            code_B=p.batch_B,
            path=self.config.likelihood_path,
        )

    @torch.no_grad()
    def constants(self, batch: Batch) -> dict[str, Tensor]:
        seen_BG = self._seen(cell_sizes(seen(batch.counts, self.device), batch, self.schema), batch)
        return {"product": self.encoder.trunk.first_product(seen_BG)}

    def _seen_or_known(
        self, size_B: Tensor, batch: Batch, x: Tensor | Sparse | None
    ) -> tuple[Tensor | SeenCounts | None, Tensor | None]:
        """What the encoder sees of the counts, or the first layer's product with it."""
        product_BH = batch.known.get("product")
        return self._seen(size_B, batch, x) if product_BH is None else None, product_BH

    def _seen(self, size_B: Tensor, batch: Batch, x: Tensor | Sparse | None = None) -> Tensor | SeenCounts:
        """What the encoder sees of the counts."""
        mse, weight_HI = self.config.recon_loss == "mse", self.encoder.trunk.first.weight
        return encoder_input(size_B, batch, self.config, mse=mse, x=x, weight_HI=weight_HI)

    @torch.no_grad()
    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent, (B, L) each."""
        return self.encode(cell_sizes(seen(batch.counts, self.device), batch, self.schema), batch)
