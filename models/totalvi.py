"""totalVI: genes and surface proteins of CITE-seq cells in one latent space (Gayoso et al. 2021, Nat Methods 18).

    q(z | x, y, s) = Normal;  p(x | z, s) = NB(library * softmax(W h), theta)
    p(y | z, s, b) = pi NB(e b, phi) + (1 - pi) NB(e b a, phi);  log b ~ Normal(m(z, s), d(z, s));  a >= 1

A protein's counts are background `b` with probability `pi`, else foreground, `a` times the background; `e` is
the efficiency of the protein in its batch. Proteins that a cell was not measured for are left out of the loss, so
batches with proteins and batches of RNA alone train together, and proteins of the latter can be imputed. Function
and defaults are those of scvi-tools 1.4.2 (tests/parity); differences on purpose are in docs/deviations.md.

Shapes: B cells, G genes, P proteins, L latent dimensions, H hidden units, K batches.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.engine.errors import CategoryError, UsageError
from scarcade.engine.schema import Schema
from scarcade.models import protein_outputs
from scarcade.models.adversary import Adversary
from scarcade.models.distributions import draw, kl_normal, nb_mixture_elements
from scarcade.models.layers import ConditionalLinear, Dispersion, Encoder, FullyConnected, seeded
from scarcade.models.library import LibraryPrior
from scarcade.models.model import AtlasModel, Output
from scarcade.models.protein_background import CELLS, BackgroundPrior, Efficiency, sums
from scarcade.models.scvi import RECIPES, Decoded, Posterior, Scvi
from scarcade.models.sparse import Sparse, seen
from scarcade.models.sparse_product import SeenCounts, without_zeros
from scarcade.models.trained_head import logits_of

LOG_SQRT_2PI = 0.9189385332046727
MOST_SAMPLED = 1_000_000
"""Cells after which the search for cells of rare batches, to start the background prior from, is given up."""


@dataclass(frozen=True, slots=True)
class Proteins:
    """The parameters of the likelihood of proteins for B cells, without the efficiency."""

    back_mean_BP: Tensor  # of the posterior of the log background
    back_sd_BP: Tensor
    rate_back_BP: Tensor
    fore_scale_BP: Tensor
    mixing_BP: Tensor  # logits of being background
    log_theta: Tensor  # (P,) or (B, P)
    log_efficiency_BP: Tensor | None

    @property
    def rate_fore_BP(self) -> Tensor:
        return self.rate_back_BP * self.fore_scale_BP

    @property
    def foreground_BP(self) -> Tensor:
        """Probability of being foreground."""
        return torch.sigmoid(-self.mixing_BP)

    def log_likelihood(self, y_BP: Tensor) -> Tensor:
        """log p(y) of each protein, (B, P)."""
        back_BP = self.rate_back_BP
        if self.log_efficiency_BP is not None:
            back_BP = self.log_efficiency_BP.exp() * back_BP
        return nb_mixture_elements(y_BP, back_BP, back_BP * self.fore_scale_BP, self.log_theta, self.mixing_BP)


@dataclass(frozen=True, slots=True)
class DecodedBoth(Decoded):
    """The parameters of both likelihoods."""

    proteins: Proteins


class Totalvi(Scvi):
    """scVI with proteins: the same outputs for genes, and `outputs` for proteins."""

    name: ClassVar[str] = "totalvi"
    obsm_key: ClassVar[str] = "X_totalVI"
    recipes: ClassVar[Mapping[str, Mapping[str, object]]] = RECIPES
    training_recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    decoder_norms: ClassVar[tuple[str, ...]] = (
        "decoder.norm.",
        "background_decoder.norm.",
        "foreground_decoder.norm.",
        "mixing_decoder.norm.",
    )
    sees_proteins: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, Output]] = protein_outputs.OUTPUTS

    class Config(Scvi.Config):
        """Architecture of totalVI. Defaults are those of scvi-tools."""

        n_hidden: int = Field(256, ge=1, le=65536, description="units of each hidden layer")
        n_latent: int = Field(20, ge=1, le=4096, description="dimensions of the latent space")
        n_layers: int = Field(2, ge=1, le=64, description="hidden layers of the encoder")
        n_layers_decoder: int = Field(1, ge=1, le=64, description="hidden layers of each part of the decoder")
        dropout_rate: float = Field(0.2, ge=0, lt=1, description="dropout in the encoder")
        dropout_rate_decoder: float = Field(0.2, ge=0, lt=1, description="dropout in the decoder")
        dispersion: Literal["gene", "gene-batch", "gene-label"] = Field(
            "gene", description="what has an inverse dispersion of genes of its own"
        )
        protein_dispersion: Literal["protein", "protein-batch", "protein-label"] = Field(
            "protein", description="what has an inverse dispersion of proteins of its own"
        )
        gene_likelihood: Literal["nb", "zinb"] = Field("nb", description="distribution of a count given the latent")
        log_variational: bool = Field(True, description="the encoder sees log(1 + counts / (1 + a cell's mean))")
        encode_covariates: bool = Field(True, description="the encoder sees batch and covariates")
        empirical_background: bool | None = Field(
            None, description="start the background prior from cells of each batch; default: with more than 10 proteins"
        )
        protein_weight: float = Field(1.0, ge=0, description="weight of the proteins' likelihood")
        formulation: Literal["1.3.1", "1.2", "1.0"] = Field(
            "1.3.1",
            description="version of scvi-tools whose input and loss are used; older ones are for imported models",
        )
        adversary: bool | None = Field(
            None,
            description="a classifier of batches that the latent has to fool while the KL weight is below 1; default: "
            "where some cells lack some proteins",
        )

    config: Config

    def __init__(self, config: Config, schema: Schema, *, seed: int = 0) -> None:
        """The first weights are a pure function of (config, schema sizes, seed).

        Raises:
            UsageError: the data have no proteins, or lack the labels that the configuration needs.
        """
        AtlasModel.__init__(self, config, schema)  # its parts are made here, and not those of scVI
        if not schema.proteins:
            raise UsageError("totalvi needs proteins: the data have none (ingest with --protein-key)")
        if "label" in config.dispersion + config.protein_dispersion and not schema.n_labels:
            raise UsageError("a dispersion by label needs labels: the data have no label column (--label-key)")
        generator = seeded("totalvi", seed)
        sizes = {"batch": len(schema.batch)} | {f"categorical_{i}": len(c) for i, c in enumerate(schema.categorical)}
        hidden, genes, proteins = config.n_hidden, schema.n_genes, len(schema.proteins)
        n_z = config.n_latent + len(schema.continuous)

        def trunk(n_in: int, n_layers: int, part: Literal["encoder", "decoder"]) -> FullyConnected:
            return FullyConnected(
                n_in,
                hidden,
                n_layers,
                sizes if part == "decoder" or config.encode_covariates else {},
                inject=config.deeply_inject_covariates,
                dropout_rate=config.dropout_rate if part == "encoder" else config.dropout_rate_decoder,
                batch_norm=config.use_batch_norm in (part, "both"),
                layer_norm=config.use_layer_norm in (part, "both"),
                generator=generator,
            )

        def head(n_out: int) -> ConditionalLinear:
            return ConditionalLinear(hidden + n_z, n_out, sizes, generator)

        n_seen = genes + proteins + (len(schema.continuous) if config.encode_covariates else 0)
        self.encoder = Encoder(trunk(n_seen, config.n_layers, "encoder"), hidden, config.n_latent, generator)
        self.decoder = trunk(n_z, config.n_layers_decoder, "decoder")
        self.scale = head(genes)  # type: ignore[assignment]  # totalVI's heads see the covariates
        self.background_decoder = trunk(n_z, config.n_layers_decoder, "decoder")
        self.background_mean, self.background_sd = head(proteins), head(proteins)
        self.foreground_decoder = trunk(n_z, config.n_layers_decoder, "decoder")
        self.foreground = head(proteins)
        self.mixing_decoder = trunk(n_z, config.n_layers_decoder, "decoder")
        self.mixing = head(proteins)
        self.dropout = head(genes) if config.gene_likelihood == "zinb" else None  # type: ignore[assignment]
        self.theta = self._dispersion(generator)
        self.protein_theta = self._protein_dispersion(generator)
        empirical = proteins > 10 if config.empirical_background is None else config.empirical_background
        self.background = BackgroundPrior(len(schema.batch), proteins, empirical=empirical)
        self.efficiency: Efficiency | None = None
        if config.formulation == "1.3.1":
            self.efficiency = Efficiency("batch", len(schema.batch), proteins)
        self.library: Encoder | None = None
        self.library_prior: LibraryPrior | None = None
        if self.latent_library:
            self.library = Encoder(trunk(n_seen, 1, "encoder"), hidden, 1, generator)
            self.library_prior = LibraryPrior(len(schema.batch))
        self.adversary: Adversary | None = None
        if config.adversary is not False and len(schema.batch) > 1:
            self.adversary = Adversary(config.n_latent, len(schema.batch), generator)
            self.adversary.on.fill_(float(config.adversary is True))

    @classmethod
    def training_defaults(cls, n_cells: int, *, started: bool = False) -> Mapping[str, Any]:
        """The numbers of scvi-tools' TOTALVI.train."""
        optim = {"lr": 4e-3, "kl_steps": max(1, int(0.75 * n_cells)), "early_stopping": True, "plateau": True}
        return {"optim": optim, "data": {"batch_size": 256}}

    @classmethod
    def query_defaults(cls) -> Mapping[str, Any]:
        """The same for surgery: a warm-up over 0.75 n steps is one over 192 epochs of n cells in batches of 256."""
        return {"optim": {"lr": 4e-3, "kl_epochs": 192.0}, "data": {"batch_size": 256}}

    def _protein_dispersion(self, generator: torch.Generator) -> Dispersion:
        kind = self.config.protein_dispersion.removeprefix("protein-")
        rows = {"protein": 1, "batch": len(self.schema.batch), "label": self.schema.n_labels + 1}[kind]
        table = Dispersion(kind, rows, len(self.schema.proteins))
        if not table.rows.is_meta:
            with torch.no_grad():
                table.rows.uniform_(0, 2, generator=generator)
        return table

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        """Negative ELBO of each cell, as scvi-tools' TOTALVAE.loss since 1.3.1: proteins are warmed up too.

            genes + w * proteins + w * KL(z) + KL(library) + w * background;  w: the KL weight

        The term "elbo" has w = 1. While w < 1 an adversary, where there is one, adds (1 - w) times its terms.
        """
        x = self.counts_seen(batch)
        assert x is not None  # nothing of this model is known beforehand
        y_BP, measured_BP = self.proteins(batch)
        q = self.encode(x, batch, noise)
        z_BL, log_library_B1 = self.draw_latent(q, noise)
        z_BL = self.shape_latent(z_BL)
        p = self.decode(z_BL, log_library_B1, batch, noise=noise)

        genes_B = -self.log_likelihood(x, p)
        proteins_B = -torch.where(measured_BP, p.proteins.log_likelihood(y_BP), 0.0).sum(-1)
        kl_B = q.kl_B
        background_B = self.background_kl(p.proteins, batch, measured_BP)
        protein_weight = self.config.protein_weight * (step.kl_weight if self.efficiency is not None else 1.0)
        minimise_B = genes_B + protein_weight * proteins_B + step.kl_weight * (kl_B + background_B)
        terms = {
            "reconstruction": genes_B + proteins_B,
            "reconstruction_genes": genes_B,
            "reconstruction_proteins": proteins_B,
            "kl": kl_B,
            "kl_background": background_B,
        }
        elbo_B = genes_B + proteins_B + kl_B + background_B
        if self.latent_library:
            kl_library_B = terms["kl_library"] = self.library_kl(q, batch)
            minimise_B, elbo_B = minimise_B + kl_library_B, elbo_B + kl_library_B
        terms["elbo"] = elbo_B
        if self.adversary is not None and self.training and self.query_mode is None:
            fool_B, classify_B = self.adversary.losses(z_BL, batch.batch, noise)
            minimise_B = minimise_B + _left(step.kl_weight) * (fool_B + classify_B)
            terms |= {"adversary_fooled": fool_B.detach(), "adversary_error": classify_B.detach()}
        return Losses(minimise_B, terms)

    def background_kl(self, p: Proteins, batch: Batch, measured_BP: Tensor) -> Tensor:
        """What keeps background, efficiency and mixing near their priors, (B,).

        The last two are over all proteins, measured or not, as in scvi-tools.
        """
        prior_mean_BP, prior_sd_BP = self.background(batch.batch)
        kl_BP = kl_normal(p.back_mean_BP, p.back_sd_BP**2, prior_mean_BP, prior_sd_BP**2)
        total_B = torch.where(measured_BP, kl_BP, 0.0).sum(-1)
        if p.log_efficiency_BP is None:
            return total_B
        e_BP = p.log_efficiency_BP  # -log LogNormal(0, 1) at exp(e)
        return total_B + (e_BP + 0.5 * e_BP**2 + LOG_SQRT_2PI + 1e-3 * F.softplus(-p.mixing_BP)).sum(-1)

    def proteins(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Counts with zeros where they were not measured (which the encoder sees), and what was measured; (B, P).

        Raises:
            CategoryError: the cells have other proteins.
        """
        shape = len(batch), len(self.schema.proteins)
        if batch.proteins is None:
            return torch.zeros(shape, device=self.device), torch.zeros(shape, dtype=torch.bool, device=self.device)
        if batch.proteins.shape != shape:
            raise CategoryError(f"cells with {batch.proteins.shape[1]} proteins, the model knows {shape[1]}")
        measured_BP = batch.proteins_measured
        if measured_BP is None:
            measured_BP = torch.ones_like(batch.proteins, dtype=torch.bool)
        return torch.where(measured_BP, batch.proteins, 0.0), measured_BP

    def draw_latent(self, q: Posterior, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """As scVI's; a drawn log library size is 15 at most."""
        z_BL, log_library_B1 = super().draw_latent(q, noise)
        return z_BL, log_library_B1 if q.library_variance_B1 is None else log_library_B1.clamp(max=15)

    def encoder_input(
        self, batch: Batch, x: Tensor | Sparse | None = None, kind: torch.dtype = torch.float32
    ) -> Tensor | SeenCounts:
        """What encoders see of genes and proteins, and of the continuous covariates if they are encoded."""
        y_BP, _ = self.proteins(batch)
        parts = [self._scaled(y_BP, y_BP.sum(-1, keepdim=True), y_BP.shape[1])]
        if self.config.encode_covariates and batch.continuous is not None:
            parts.append(batch.continuous)
        x = seen(batch.counts, self.device) if x is None else x
        if isinstance(x, Tensor):
            return torch.cat([self._scaled(x, x.sum(-1, keepdim=True), x.shape[1]), *parts], -1).to(kind)
        values_N = self._scaled(torch.from_numpy(x.values), x.of_each(x.sums()), x.n_genes)
        beside_BC = torch.cat(parts, -1)
        cells = without_zeros(batch.counts, x, self.encoder.trunk.first_weight)
        if cells is not None:
            return SeenCounts.of(cells, values_N, beside_BC)
        out = x.dense(values_N, room=beside_BC.shape[1])
        out[:, x.n_genes :] = beside_BC
        return out.to(kind)

    def _scaled(self, counts: Tensor, total: Tensor, n: int) -> Tensor:
        """Counts as encoders see them; 0 stays 0. `total` is that of each count's cell, over `n` genes or proteins."""
        if self.config.formulation == "1.3.1":
            counts = counts / (1 + total / n)
        return torch.log1p(counts) if self.config.log_variational else counts

    def decode(
        self,
        z_BL: Tensor,
        log_library_B1: Tensor,
        batch: Batch,
        transform_batch: int | None = None,
        noise: Noise | None = None,
    ) -> DecodedBoth:
        """The parameters of both likelihoods; the background is drawn with `noise`, else its median."""
        codes = self.codes(batch, transform_batch)
        if batch.continuous is not None:
            z_BL = torch.cat([z_BL, batch.continuous], -1)

        def beside_z(trunk: FullyConnected) -> Tensor:
            return torch.cat([trunk(z_BL, codes, noise), z_BL], -1)

        logits = logits_of(self.scale, beside_z(self.decoder), codes)
        h_BH = beside_z(self.background_decoder)
        back_mean_BP = self.background_mean(h_BH, codes)
        raw_sd_BP = self.background_sd(h_BH, codes)
        back_sd_BP = (raw_sd_BP.exp() if self.config.formulation == "1.0" else F.softplus(raw_sd_BP)) + 1e-8
        fore_scale_BP = F.relu(self.foreground(beside_z(self.foreground_decoder), codes)) + 1 + 1e-8
        h_BH = beside_z(self.mixing_decoder)
        proteins = Proteins(
            back_mean_BP,
            back_sd_BP,
            draw(back_mean_BP, back_sd_BP**2, noise).exp(),
            fore_scale_BP,
            self.mixing(h_BH, codes),
            self.protein_theta.of(codes),
            None if self.efficiency is None else self.efficiency(codes["batch"]),
        )
        assert isinstance(self.theta, Dispersion)
        dropout = None if self.dropout is None else logits_of(self.dropout, h_BH, codes)
        softplus = self.schema.size_factor is not None
        return DecodedBoth(logits, log_library_B1, self.theta.of(codes), dropout, softplus, proteins)

    @property
    def sees_labels(self) -> bool:
        return "label" in self.config.dispersion + self.config.protein_dispersion

    def marginal_log_likelihood(self, batch: Batch, noise: Noise, n_samples: int) -> Tensor:
        """log p(x, y) of each cell, (B,)."""
        return protein_outputs.marginal_log_likelihood(self, batch, noise, n_samples)

    @property
    def couples(self) -> str | None:
        return "its adversary and its background of proteins are of all cells together"

    def after_growth(self) -> None:
        """A reference of one batch has no adversary, and gets none."""
        if self.adversary is None:
            self.config = self.config.model_copy(update={"adversary": False})

    @property
    def observes(self) -> bool:
        if self.is_grown and self.background.mean.new is None:
            return False
        looks_for_gaps = self.adversary is not None and self.config.adversary is None and self.query_mode is None
        return self.background.empirical or looks_for_gaps or self.library_prior is not None

    @torch.no_grad()
    def observe(self, batches: Iterable[Batch], total: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        """Start the background prior from the first cells of each batch, and see whether cells lack proteins.

        Reads until each batch that is started has had its `CELLS` cells, in steps that all workers take together, so
        the same cells are taken by any number of workers; a latent library size needs all cells.
        """
        n_batches = len(self.schema.batch)
        new = self.background.mean.new
        first = 0 if new is None else n_batches - len(new)  # of the batches before nothing is started
        found_K5 = torch.zeros(n_batches, 5, dtype=torch.float64)  # cells, cells that lack proteins, `sums`
        library_K3 = torch.zeros(n_batches, 3, dtype=torch.float64)
        seen, enough = 0, False
        for batch in batches:
            if self.library_prior is not None:
                library_K3 += self.library_prior.sums([batch])
            if not enough:
                part_K5 = self._sampled(batch, wanted_K=found_K5[:, 0] < CELLS)
                found_K5 += total(part_K5.to(self.device)).cpu()
                seen += batch.n_global
                enough = bool((found_K5[first:, 0] >= CELLS).all()) or seen >= MOST_SAMPLED
            if enough and self.library_prior is None:
                break
        if self.background.empirical:
            self.background.fill(found_K5[:, 2:])
        if self.adversary is not None and self.config.adversary is None and self.query_mode is None:
            self.adversary.on.fill_(float(found_K5[:, 1].sum() > 0))
        if self.library_prior is not None:
            self.library_prior.fill(total(library_K3.to(self.device)).cpu())

    def _sampled(self, batch: Batch, wanted_K: Tensor) -> Tensor:
        """(K, 5) of the cells of the wanted batches; see `observe`."""
        _, measured_BP = self.proteins(batch)
        codes_B = batch.batch.cpu()
        taken_B = wanted_K[codes_B]
        lack_B = taken_B & ~measured_BP.all(-1).cpu()
        counted_K2 = torch.zeros(len(wanted_K), 2, dtype=torch.float64)
        counted_K2.index_add_(0, codes_B, torch.stack([taken_B, lack_B], -1).double())
        fitted_K3 = sums(batch, len(wanted_K), wanted_K) if self.background.empirical else counted_K2.new_zeros(1, 3)
        return torch.cat([counted_K2, fitted_K3.expand(len(wanted_K), 3)], -1)


def _left(kl_weight: float | Tensor) -> float | Tensor:
    """What of 1 a KL weight leaves; a tensor stays on its GPU."""
    return (1 - kl_weight).clamp(min=0) if isinstance(kl_weight, Tensor) else max(0.0, 1 - kl_weight)
