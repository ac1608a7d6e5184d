"""scGen: an autoencoder of normalised expression, in whose latent space responses and batches are vectors.

    loss = mean over genes of (decoded - x)^2 + kl_weight * KL(z);  x = log(1 + counts scaled to a sum)

Lotfollahi et al. 2019 (Nat Methods 16), as scArches 0.6.1 has it (tests/parity). The network knows no condition, so
surgery has nothing to add: what conditions do is found by arithmetic on means of the latent (`jobs.arithmetic`).

Shapes: B cells, G genes, L latent dimensions, H hidden units.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.engine.schema import Schema
from scarcade.models.distributions import draw
from scarcade.models.layers import Linear, hidden_units, seeded
from scarcade.models.model import AtlasModel, Output
from scarcade.models.normal import latent, moments
from scarcade.models.scarches_layers import BatchNorm, PlainLinear, Widths, cell_sizes, log_normalised
from scarcade.models.sparse import seen
from scarcade.models.squared_error import mean_squared_error

SLOPE = 0.3


class LeakyStack(nn.Module):
    """Hidden layers, each linear without a bias, batch norm, leaky ReLU, dropout.

    With `bare_first` the first is the linear map alone: an oversight of the original that its weights depend on.
    """

    def __init__(
        self, widths: Sequence[int], dropout_rate: float, generator: torch.Generator, *, bare_first: bool
    ) -> None:
        super().__init__()
        self.dropout_rate, self.bare_first = dropout_rate, bare_first
        self.linear = nn.ModuleList(PlainLinear(n_in, n_out, generator) for n_in, n_out in pairwise(widths))
        self.norm = nn.ModuleList(BatchNorm(n) for n in widths[1 + bare_first :])

    def forward(self, x_BI: Tensor, noise: Noise | None) -> Tensor:
        """(B, H) from (B, I)."""
        for i, linear in enumerate(self.linear):
            if i < self.bare_first:
                x_BI = linear(x_BI)
                continue
            x_BI = hidden_units(
                linear,
                x_BI,
                {},
                norm=self.norm[i - self.bare_first],  # type: ignore[arg-type]
                layer_norm=False,
                slope=SLOPE,
                noise=noise if self.training else None,
                dropout_rate=self.dropout_rate,
            )
        return x_BI


def _decoded(model: "Scgen", batch: Batch, noise: Noise | None) -> Tensor:
    mean_BL, variance_BL = model.encode(model.expression(batch), noise=None)
    return model.decode(draw(mean_BL, variance_BL, noise))


class Scgen(AtlasModel):
    """The model. `encode` takes and `decode` gives normalised log expression."""

    name: ClassVar[str] = "scgen"
    obsm_key: ClassVar[str] = "X_scGen"
    recordable: ClassVar[bool] = True
    decoder_norms: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[Mapping[str, Output]] = {
        "expression": Output(
            of=_decoded,
            columns=lambda model: model.schema.genes,
            about="Decoded normalised log expression.",
            decodes=False,
            genes=True,
        )
    }

    class Config(AtlasModel.Config):
        """Architecture and loss of scGen. Defaults are those of scArches."""

        hidden_layer_sizes: Widths = Field((128, 128), description="units of the encoder's layers; the decoder mirrors")
        n_latent: int = Field(10, ge=1, le=4096, description="dimensions of the latent space")
        dropout_rate: float = Field(0.05, ge=0, lt=1, description="dropout in encoder and decoder")
        kl_weight: float = Field(
            3.2e-5, ge=0, description="weight of a cell's KL term (scArches: 1e-6, summed over a batch of 32 cells)"
        )
        target_sum: float = Field(1e4, gt=0, description="counts of a cell are scaled to this sum before log1p")

    config: Config

    def __init__(self, config: Config, schema: Schema, *, seed: int = 0) -> None:
        super().__init__(config, schema, seed=seed)
        generator = seeded("scgen", seed)
        hidden, genes = config.hidden_layer_sizes, schema.n_genes
        self.encoder = LeakyStack((genes, *hidden), config.dropout_rate, generator, bare_first=True)
        self.mean = Linear(hidden[-1], config.n_latent, generator)
        self.log_variance = Linear(hidden[-1], config.n_latent, generator)
        self.decoder = LeakyStack((config.n_latent, *hidden[::-1]), config.dropout_rate, generator, bare_first=False)
        self.scale = Linear(hidden[0], genes, generator)

    @classmethod
    def training_defaults(cls, n_cells: int, *, started: bool = False) -> Mapping[str, Any]:
        """The numbers of scArches' trainer."""
        optim = {"epochs": 100, "eps": 1e-8, "weight_decay": 0.0, "kl_epochs": 0.0}
        return {"optim": {**optim, "early_stopping": True, "stop_patience": 20}, "data": {"batch_size": 32}}

    @property
    def encodes_batch(self) -> bool:
        return False

    @property
    def compiled(self) -> bool:
        """As of `AtlasModel`."""
        return self.scale.weight.device.type == "cpu" and self.scale.weight.dtype == torch.float32

    @property
    def surgery_notice(self) -> str | None:
        return (
            "scgen has no weights of a batch: mapping encodes the cells of a query and trains nothing; to take the "
            "query's batch effect out, `scarcade.jobs.correction.map_corrected` compares its labelled cells"
        )

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        """Squared error of each cell, the mean over genes, and its weighted KL; there is no warm-up.

        With `noise=None` latents are their means. The term "elbo" is what is minimised.
        """
        x_BG = self.expression(batch)
        _, _, z_BL, kl_B = latent(self.encoder(x_BG, noise), self.mean, self.log_variance, noise, 0.0)
        h_BH = self.decoder(z_BL, noise)
        error_B = mean_squared_error(x_BG, h_BH, self.scale.weight, self.scale.bias)
        minimise_B = error_B + self.config.kl_weight * kl_B
        return Losses(minimise_B, {"reconstruction": error_B, "kl": kl_B, "elbo": minimise_B})

    def expression(self, batch: Batch) -> Tensor:
        """Normalised log expression, (B, G)."""
        x = seen(batch.counts, self.device)
        return log_normalised(x, cell_sizes(x, batch, self.schema), self.config.target_sum)

    def encode(self, x_BG: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent of normalised log expression; `noise` is for dropout."""
        return moments(self.encoder(x_BG, noise), self.mean, self.log_variance, 0.0)

    def decode(self, z_BL: Tensor, noise: Noise | None = None) -> Tensor:
        """Normalised log expression, (B, G); `noise` is for dropout."""
        decoded_BG: Tensor = self.scale(self.decoder(z_BL, noise))
        return decoded_BG

    @torch.no_grad()
    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent, (B, L) each."""
        return self.encode(self.expression(batch))
