"""scVI: a variational autoencoder of single-cell counts with conditions (Lopez et al. 2018, Nat Methods 15).

    q(z | x, s) = Normal(m(x, s), v(x, s));  p(x | z, s) = ZINB(library * softmax(W h(z, s)), theta, dropout)

The function, the defaults and the first weights' distribution are those of scvi-tools 1.4.2 (tests/parity);
what differs on purpose is in docs/deviations.md. Only what a configuration uses is built, so every
parameter has a gradient.

Shapes: B cells, G genes, L latent dimensions, H hidden units.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.engine.errors import CategoryError, UsageError
from scarcade.engine.schema import Schema
from scarcade.models import outputs
from scarcade.models.distributions import Family, Path, draw, kl_normal, kl_to_standard_normal, log_likelihood
from scarcade.models.frozen_head import FrozenHead
from scarcade.models.frozen_head import why_not as head_is_not_for_it
from scarcade.models.layers import Codes, Dispersion, Encoder, FullyConnected, Linear, seeded
from scarcade.models.library import LibraryPrior
from scarcade.models.likelihood import compiles, counts_for, fused, why_not
from scarcade.models.model import AtlasModel, Output
from scarcade.models.normal import Latent
from scarcade.models.sparse import Sparse, seen, totals
from scarcade.models.sparse_product import SeenCounts, without_zeros
from scarcade.models.trained_head import Logits, logits_of

Where = Literal["encoder", "decoder", "none", "both"]
_KNOWN = {"product", "log_library", "log_p"}  # of a cell: then its counts need not be made dense


@dataclass(frozen=True, slots=True)
class Posterior:
    """What the encoder says of B cells: the latent before any softmax, and the log library size."""

    mean_BL: Tensor
    variance_BL: Tensor
    log_library_B1: Tensor  # observed (or from the size factor); the mean of its posterior if latent
    library_variance_B1: Tensor | None = None  # of the log library; None unless it is latent
    drawn: Latent | None = None  # of the encoder, where it drew already

    @property
    def kl_B(self) -> Tensor:
        """KL divergence of the latent from N(0, I), (B,)."""
        return self.drawn.kl_B if self.drawn is not None else kl_to_standard_normal(self.mean_BL, self.variance_BL)


@dataclass(frozen=True, slots=True)
class Decoded:
    """The parameters of the likelihood for B cells."""

    logits: Logits
    log_library_B1: Tensor
    log_theta: Tensor | None  # (G,) or (B, G)
    dropout: Logits | None  # logits of an extra zero
    softplus: bool  # the scale is softplus of the logits (size factors) and not their softmax

    @property
    def logits_BG(self) -> Tensor:
        return self.logits.tensor()

    @property
    def dropout_BG(self) -> Tensor | None:
        return None if self.dropout is None else self.dropout.tensor()

    @property
    def scale_BG(self) -> Tensor:
        return F.softplus(self.logits_BG) if self.softplus else torch.softmax(self.logits_BG, -1)

    @property
    def rate_BG(self) -> Tensor:
        return self.log_library_B1.exp() * self.scale_BG


RECIPES: dict[str, dict[str, object]] = {
    "scvi": {},
    # what architecture surgery wants: Lotfollahi et al. 2022, and the scArches tutorials of scvi-tools
    "scarches": {
        "n_layers": 2,
        "dropout_rate": 0.2,
        "encode_covariates": True,
        "deeply_inject_covariates": True,
        "use_layer_norm": "both",
        "use_batch_norm": "none",
        "gene_likelihood": "nb",
    },
}
"""Named settings of `Scvi.Config` (``--recipe``)."""


class Scvi(AtlasModel):
    """The model. `losses` is the objective; `encode` and `decode` are what all outputs are made of."""

    name: ClassVar[str] = "scvi"
    obsm_key: ClassVar[str] = "X_scVI"
    recordable: ClassVar[bool] = True
    recipes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        **RECIPES,
        # what carried labels over best of all that was measured (docs/which-model.md)
        "transfer": {**RECIPES["scarches"], "gene_likelihood": "zinb"},
    }
    training_recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"transfer": {"data": {"stratify": True}}}
    outputs: ClassVar[Mapping[str, Output]] = outputs.OUTPUTS

    class Config(AtlasModel.Config):
        """Architecture of scVI. Defaults are those of scvi-tools."""

        n_hidden: int = Field(128, ge=1, le=65536, description="units of each hidden layer")
        n_latent: int = Field(10, ge=1, le=4096, description="dimensions of the latent space")
        n_layers: int = Field(1, ge=1, le=64, description="hidden layers of the encoder and of the decoder")
        dropout_rate: float = Field(0.1, ge=0, lt=1, description="dropout in the encoder")
        dispersion: Literal["gene", "gene-batch", "gene-label", "gene-cell"] = Field(
            "gene", description="what has an inverse dispersion (or standard deviation) of its own"
        )
        gene_likelihood: Family = Field("zinb", description="distribution of a count given the latent")
        latent_distribution: Literal["normal", "ln"] = Field(
            "normal", description="ln: the latent is the softmax of a normal variable"
        )
        log_variational: bool = Field(True, description="the encoder sees log(1 + counts)")
        encode_covariates: bool = Field(
            False, description="the encoder sees batch and covariates; surgery needs it to move cells"
        )
        deeply_inject_covariates: bool = Field(True, description="conditions enter every layer, not the first alone")
        use_batch_norm: Where = Field("both", description="batch normalisation")
        use_layer_norm: Where = Field("none", description="layer normalisation")
        use_observed_lib_size: bool = Field(
            True, description="library size is the sum of a cell's counts; else it is inferred"
        )
        likelihood_path: Path = Field(
            "auto",
            description="how the likelihood is computed: fused (compiled), analytic (torch), eager (the plain "
            "formula); auto: fused where it can, else analytic; all agree to 1e-5",
        )

    config: Config

    def __init__(self, config: Config, schema: Schema, *, seed: int = 0) -> None:
        """The first weights are a pure function of (config, schema sizes, seed).

        Raises:
            UsageError: the configuration needs something that the schema does not have.
        """
        super().__init__(config, schema)
        if config.dispersion == "gene-label" and not schema.n_labels:
            raise UsageError("dispersion gene-label needs labels: the data have no label column (--label-key)")
        generator = seeded("scvi", seed)
        sizes = {"batch": len(schema.batch)} | {f"categorical_{i}": len(c) for i, c in enumerate(schema.categorical)}
        n_continuous = len(schema.continuous)
        encoded = config.encode_covariates

        def trunk(n_in: int, n_layers: int, part: Literal["encoder", "decoder"]) -> FullyConnected:
            conditions = sizes if part == "decoder" or encoded else {}
            return FullyConnected(
                n_in + (n_continuous if part == "decoder" or encoded else 0),
                config.n_hidden,
                n_layers,
                conditions,
                inject=config.deeply_inject_covariates,
                dropout_rate=config.dropout_rate if part == "encoder" else 0.0,
                batch_norm=config.use_batch_norm in (part, "both"),
                layer_norm=config.use_layer_norm in (part, "both"),
                generator=generator,
            )

        hidden, genes = config.n_hidden, schema.n_genes
        self.encoder = Encoder(trunk(genes, config.n_layers, "encoder"), hidden, config.n_latent, generator)
        self.decoder = trunk(config.n_latent, config.n_layers, "decoder")
        self.scale = Linear(hidden, genes, generator)
        self.dropout = Linear(hidden, genes, generator) if config.gene_likelihood == "zinb" else None
        self.theta = self._dispersion(generator)
        self.library: Encoder | None = None
        self.library_prior: LibraryPrior | None = None
        if self.latent_library:
            self.library = Encoder(trunk(genes, 1, "encoder"), hidden, 1, generator)
            self.library_prior = LibraryPrior(len(schema.batch))

    def _dispersion(self, generator: torch.Generator) -> nn.Module | None:
        """One row of log theta, or one for each category, or a head for `gene-cell`; first values N(0, 1)."""
        kind, genes = self.config.dispersion, self.schema.n_genes
        if self.config.gene_likelihood == "poisson":
            return None
        if kind == "gene-cell":
            return Linear(self.config.n_hidden, genes, generator)
        # gene-label has one row more, for the cells without a label
        rows = {"gene": 1, "gene-batch": len(self.schema.batch), "gene-label": self.schema.n_labels + 1}[kind]
        table = Dispersion(kind.removeprefix("gene-"), rows, genes)
        if not table.rows.is_meta:
            with torch.no_grad():
                table.rows.normal_(generator=generator)
        return table

    @property
    def latent_library(self) -> bool:
        """Whether the library size is inferred: a size factor always takes its place."""
        return not self.config.use_observed_lib_size and self.schema.size_factor is None

    @property
    def encodes_batch(self) -> bool:
        return self.config.encode_covariates

    @property
    def surgery_notice(self) -> str | None:
        """What to tell before training and before mapping, if surgery cannot move this model's cells."""
        if self.config.encode_covariates:
            return None
        return (
            "the encoder of this model does not see the batch (encode_covariates = false), so surgery trains the "
            "decoder alone and does not move the latent of mapped cells; train the reference with "
            "--recipe scarches to change that"
        )

    @property
    def labels_are_fixed(self) -> bool:
        return self.classifies or self.sees_labels

    @property
    def sees_labels(self) -> bool:
        """Whether a label has weights of its own."""
        return "label" in self.config.dispersion

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        """Negative ELBO of each cell: reconstruction + w * KL(z) + KL(library), spec of scvi-tools' VAE.loss.

        With `noise=None` latents are their means. The term "elbo" is the negative ELBO with w = 1.
        """
        x = self.counts_seen(batch)
        q = self.encode(x, batch, noise)
        z_BL, log_library_B1 = self.draw_latent(q, noise)

        reconstruction_B = -self.log_p(x, self.shape_latent(z_BL), log_library_B1, batch)
        kl_B = q.kl_B
        minimise_B, terms = reconstruction_B + step.kl_weight * kl_B, {"reconstruction": reconstruction_B, "kl": kl_B}
        elbo_B = reconstruction_B + kl_B
        if self.latent_library:
            kl_library_B = terms["kl_library"] = self.library_kl(q, batch)
            minimise_B, elbo_B = minimise_B + kl_library_B, elbo_B + kl_library_B
        return Losses(minimise_B, {**terms, "elbo": elbo_B})

    def counts_seen(self, batch: Batch) -> Tensor | Sparse | None:
        """Counts (B, G) as the likelihood takes them; None where all that is wanted of them is known (`constants`)."""
        if batch.known.keys() >= _KNOWN:
            return None
        softplus = self.schema.size_factor is not None
        family, path = self.config.gene_likelihood, self.config.likelihood_path
        return counts_for(batch.counts, family, self.scale.weight, path, softplus=softplus)

    @property
    def compiled(self) -> bool:
        """As of `AtlasModel`."""
        softplus = self.schema.size_factor is not None
        return compiles(self.config.gene_likelihood, self.scale.weight, self.config.likelihood_path, softplus=softplus)

    def encode(self, x: Tensor | Sparse | None, batch: Batch, noise: Noise | None = None) -> Posterior:
        """The posterior of each cell.

        Args:
            x: counts (B, G), for the library; None where it and the first layer's product are known.
            noise: for dropout, in training mode only, and for the draw that `draw_latent` then gives.
        """
        codes, product_BH = self.codes(batch), batch.known.get("product")
        x_BI = None if x is None else self.encoder_input(batch, x, self.encoder.trunk.kind)
        if self.library is not None:
            # its dropout comes before the draw of both
            mean_BL, variance_BL = self.encoder(x_BI, codes, noise, product_BH)
            return Posterior(mean_BL, variance_BL, *self.library(x_BI, codes, noise))
        log_library_B1 = self._log_sizes(x, batch)[:, None]
        if noise is None:
            mean_BL, variance_BL = self.encoder(x_BI, codes, None, product_BH)
            return Posterior(mean_BL, variance_BL, log_library_B1)
        drawn = self.encoder.latent(x_BI, codes, noise, product_BH)
        return Posterior(drawn.mean_BL, drawn.variance_BL, log_library_B1, drawn=drawn)

    def _log_sizes(self, x: Tensor | Sparse | None, batch: Batch) -> Tensor:
        """The log library of each cell as it is observed, or its log size factor, (B,).

        An empty cell has log library -inf and rate 0.
        """
        if x is None:
            return batch.known["log_library"]
        if self.schema.size_factor is None:
            return totals(x).log()
        if batch.size_factor is None:
            raise CategoryError(f"the model needs the size factor '{self.schema.size_factor}' of every cell")
        return batch.size_factor.log()

    @torch.no_grad()
    def constants(self, batch: Batch) -> dict[str, Tensor]:
        """The product of the first layer; with a head that is frozen too, all that is wanted of the counts' zeros."""
        found = {"product": self.encoder.trunk.first_product(self.encoder_input(batch))}
        head = self.frozen_head()
        if head is None:
            return found
        log_library_B = totals(seen(batch.counts, self.device)).log()
        return {**found, "log_library": log_library_B, "log_p": head.constants(batch.counts)}

    def frozen_head(self) -> FrozenHead | None:
        """The last layer and the likelihood as one function, where nothing of them is trained; else None."""
        config, theta = self.config, self.theta
        plain = config.gene_likelihood in ("nb", "zinb") and config.dispersion == "gene" and not self.latent_library
        if not plain or self.schema.size_factor is not None or config.likelihood_path not in ("auto", "fused"):
            return None
        assert isinstance(theta, Dispersion)
        head = FrozenHead(self.scale, self.dropout, theta.rows[0])
        return head if head_is_not_for_it(head) is None else None

    def log_p(self, x: Tensor | Sparse | None, z_BL: Tensor, log_library_B1: Tensor, batch: Batch) -> Tensor:
        """log p(x | z) of each cell, (B,)."""
        if x is not None:
            return self.log_likelihood(x, self.decode(z_BL, log_library_B1, batch))
        head = self.frozen_head()
        assert head is not None
        return head.log_p(self.hidden(z_BL, batch), batch.counts, log_library_B1[:, 0], batch.known["log_p"])

    def draw_latent(self, q: Posterior, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """A draw of the latent (B, L), as it is before `shape_latent`, and of the log library size (B, 1)."""
        z_BL = draw(q.mean_BL, q.variance_BL, noise) if q.drawn is None else q.drawn.z_BL
        if q.library_variance_B1 is None:
            return z_BL, q.log_library_B1
        return z_BL, draw(q.log_library_B1, q.library_variance_B1, noise)

    def encoder_input(
        self, batch: Batch, x: Tensor | Sparse | None = None, kind: torch.dtype = torch.float32
    ) -> Tensor | SeenCounts:
        """What encoders see of the counts, and of the continuous covariates if they are encoded.

        Args:
            x: the counts, where they have been taken from the batch already.
            kind: of number, as the first product takes them.
        """
        counts, logs = batch.counts, self.config.log_variational
        cells = without_zeros(counts, x, self.encoder.trunk.first_weight)
        if cells is not None:
            beside_BC = batch.continuous if self.config.encode_covariates else None
            return SeenCounts.logs(cells, beside_BC) if logs else SeenCounts(cells, beside_BC)
        x_BI = counts.log1p(self.device, kind) if logs else counts.dense(self.device).to(kind)
        if self.config.encode_covariates and batch.continuous is not None:
            x_BI = torch.cat([x_BI, batch.continuous.to(kind)], -1)
        return x_BI

    def decode(self, z_BL: Tensor, log_library_B1: Tensor, batch: Batch, transform_batch: int | None = None) -> Decoded:
        """The likelihood's parameters; with `transform_batch` as if every cell were of that batch."""
        codes = self.codes(batch, transform_batch)
        h_BH = self.hidden(z_BL, batch, codes)
        log_theta = self.theta.of(codes) if isinstance(self.theta, Dispersion) else None
        if log_theta is None and self.theta is not None:
            log_theta = self.theta(h_BH)
        dropout = None if self.dropout is None else logits_of(self.dropout, h_BH, codes)
        softplus = self.schema.size_factor is not None
        return Decoded(logits_of(self.scale, h_BH, codes), log_library_B1, log_theta, dropout, softplus)

    def hidden(self, z_BL: Tensor, batch: Batch, codes: Codes | None = None) -> Tensor:
        """The decoder's last hidden layer, (B, H)."""
        if batch.continuous is not None:
            z_BL = torch.cat([z_BL, batch.continuous], -1)
        h_BH: Tensor = self.decoder(z_BL, self.codes(batch) if codes is None else codes, None)
        return h_BH

    def codes(self, batch: Batch, transform_batch: int | None = None) -> dict[str, Tensor]:
        """The codes of every covariate that has weights; an unlabelled cell has the code after the last label."""
        codes = {"batch": batch.batch}
        if self.sees_labels:
            codes["label"] = torch.where(batch.labels < 0, self.schema.n_labels, batch.labels)
        if transform_batch is not None:
            codes["batch"] = torch.full_like(batch.batch, transform_batch)
        if batch.categorical is not None:
            codes |= {f"categorical_{i}": code_B for i, code_B in enumerate(batch.categorical.unbind(-1))}
        return codes

    def shape_latent(self, z_BL: Tensor) -> Tensor:
        """The latent as the decoder and the users see it: its softmax if `latent_distribution` is "ln"."""
        return torch.softmax(z_BL, -1) if self.config.latent_distribution == "ln" else z_BL

    def log_likelihood(self, x: Tensor | Sparse, p: Decoded) -> Tensor:
        """log p(x | z) of each cell, (B,).

        Args:
            x: counts (B, G), as `counts_seen` gives them.

        Raises:
            UsageError: `likelihood_path` is "fused" and the kernel cannot compute this likelihood.
        """
        family, path = self.config.gene_likelihood, self.config.likelihood_path
        if path in ("auto", "fused"):
            reason = why_not(family, p.logits.h_BH, softplus=p.softplus)
            if reason is None and p.log_theta is not None:
                return fused(x, p.logits, p.log_library_B1[:, 0], p.log_theta, p.dropout)
            if path == "fused":
                raise UsageError(f"--model.likelihood-path fused: the kernel cannot do this: {reason}")
        assert isinstance(x, Tensor)
        return log_likelihood(family, x, p.rate_BG, p.log_theta, p.dropout_BG, path=path)

    def library_kl(self, q: Posterior, batch: Batch) -> Tensor:
        """KL(q(log library) || prior of the cell's batch), (B,); 0 unless the library size is latent."""
        if self.library_prior is None or q.library_variance_B1 is None:
            return torch.zeros_like(q.log_library_B1[:, 0])
        mean_K, variance_K = self.library_prior.parts()
        prior = mean_K[batch.batch], variance_K[batch.batch]
        return kl_normal(q.log_library_B1[:, 0], q.library_variance_B1[:, 0], *prior)

    @torch.no_grad()
    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent, (B, L) each. Of "ln" they are estimated from 1,000 draws.

        The draws are the same for every cell, so that a cell's latent does not depend on its batch of cells.
        """
        q = self.encode(seen(batch.counts, self.device), batch)
        if self.config.latent_distribution == "normal":
            return q.mean_BL, q.variance_BL
        noise_SL = torch.randn(1000, self.config.n_latent, generator=seeded("ln")).to(self.device)
        total_BL, squares_BL = torch.zeros_like(q.mean_BL), torch.zeros_like(q.mean_BL)
        for noise_L in noise_SL:
            z_BL = torch.softmax(q.mean_BL + q.variance_BL.sqrt() * noise_L, -1)
            total_BL += z_BL
            squares_BL += z_BL**2
        mean_BL = total_BL / len(noise_SL)
        return mean_BL, (squares_BL / len(noise_SL) - mean_BL**2).clamp_(min=0)

    @torch.no_grad()
    def draw(self, batch: Batch, noise: Noise | None) -> Tensor:
        """A draw of the latent; of "ln" its softmax, which is not a draw from the moments of `embed`."""
        z_BL, _ = self.draw_latent(self.encode(seen(batch.counts, self.device), batch), noise)
        return self.shape_latent(z_BL)

    def marginal_log_likelihood(self, batch: Batch, noise: Noise, n_samples: int) -> Tensor:
        """log p(x) of each cell, (B,)."""
        return outputs.marginal_log_likelihood(self, batch, noise, n_samples)

    @property
    def observes(self) -> bool:
        """Whether `observe` must be called once before training: not for a query of the reference's own batches."""
        return self.library_prior is not None and (not self.is_grown or self.library_prior.new_mean is not None)

    @torch.no_grad()
    def observe(self, batches: Iterable[Batch], total: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        """One pass over the data for what depends on all of it: the library size of each batch.

        Args:
            total: adds a tensor up over all workers.
        """
        if self.library_prior is None:
            return
        sums_K3 = self.library_prior.sums(batches)
        self.library_prior.fill(total(sums_K3.to(self.device)).cpu())
