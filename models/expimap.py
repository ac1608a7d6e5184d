"""expiMap: a conditional autoencoder whose latent dimensions are gene programs (Lotfollahi et al. 2023, Nat Cell Biol).

    loss = reconstruction + w * KL(z) + beta * HSIC(new terms, the rest);  after each step: group lasso over programs

The decoder is one linear layer. The weights of a program are 0 outside its genes (hard mask), or are shrunk there
(soft mask); a program that explains nothing is switched off by the lasso. New terms are learned beside the programs:
constrained ones, with genes of their own, and unconstrained ones; surgery can add both to a trained reference.

The function and the names are those of scArches 0.6.1 (tests/parity), the defaults those of its tutorial; what
differs on purpose is in docs/deviations.md. Shapes: B cells, G genes, H hidden units, T programs, E new terms,
L = T + E latent dimensions, ordered [programs | constrained | unconstrained].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from scarcade.engine.config import checked
from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.engine.errors import UsageError
from scarcade.engine.optim import default_epochs
from scarcade.engine.schema import Schema
from scarcade.models.distributions import draw, kl_to_standard_normal, log_likelihood
from scarcade.models.hsic import hsic
from scarcade.models.layers import seeded
from scarcade.models.likelihood import compiles, counts_for, counts_log_likelihood
from scarcade.models.model import AtlasModel, Output, Where
from scarcade.models.normal import Latent, latent, moments
from scarcade.models.programs import Programs, program_mask
from scarcade.models.proximal import annealed, shrink_, shrink_groups_
from scarcade.models.scarches_layers import (
    ScarchesConfig,
    SplitLinear,
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
from scarcade.models.terms import CONSTRAINED, FREE, Terms
from scarcade.models.trained_head import Logits, logits_of

EXTENDS = (
    *("n_ext", "new_programs", "use_hsic", "hsic_one_vs_all", "beta"),
    *("gamma_ext", "gamma_epochs", "alpha_l1", "alpha_l1_epochs"),
)
"""Settings of `Expimap.Config` that surgery may give for a query."""


def _expression(model: "Expimap", batch: Batch, noise: Noise | None, *, transform_batch: Where = None) -> Tensor:
    """The decoder's output, (B, G): frequencies of genes, or what another last layer gives."""
    z_BL, codes = model.draw(batch, noise), model.batch_codes(transform_batch)
    return torch.stack([model.decoded(z_BL, batch, code) for code in codes]).mean(0)


def _programs(model: "Expimap", batch: Batch, noise: Noise | None) -> Tensor:
    """The latent times the direction of each term, (B, L): higher is more expression of its genes."""
    return model.draw(batch, noise) * model.directions()[0]


def _check_names(config: "Expimap.Config", option: str) -> None:
    """Raises UsageError if two latent dimensions have the same name; `option` is where they were given."""
    seen: set[str] = set()
    for name in config.terms():
        if name in seen:
            raise UsageError(
                f"{option}: two latent dimensions are named {name!r}; names in programs and new_programs must differ, "
                "and unconstrained_0, unconstrained_1, ... are those of n_ext"
            )
        seen.add(name)


class Expimap(AtlasModel):
    """The model. `losses` is the objective; `encode` and `decode` are what all outputs are made of."""

    name: ClassVar[str] = "expimap"
    obsm_key: ClassVar[str] = "X_expiMap"
    recordable: ClassVar[bool] = True
    outputs: ClassVar[Mapping[str, Output]] = {
        "expression": Output(
            _expression, lambda model: model.schema.genes, "Decoded frequencies of genes.", genes=True
        ),
        "programs": Output(
            _programs, lambda model: model.terms_names, "Scores of gene programs, by their direction.", decodes=False
        ),
    }

    class Config(ScarchesConfig):
        """Architecture and loss of expiMap. Defaults are those of scArches' tutorial."""

        programs: Programs = Field({}, description="gene programs: name and genes (--programs FILE.gmt)")
        hidden_layer_sizes: Widths = Field((256, 256), description="units of the encoder's layers")
        recon_loss: Literal["nb", "mse"] = Field(
            "nb", description="distribution of counts, or squared error of normalised log counts"
        )
        decoder_last_layer: Literal["softmax", "softplus", "exp", "relu", "identity"] | None = Field(
            None, description="default: softmax of counts, nothing of mse; sizes of cells count with softmax alone"
        )
        alpha: float = Field(0.7, ge=0, description="group lasso over programs; larger switches more of them off")
        omega: dict[str, float] = Field({}, description="factor of alpha for a program, by its name; else 1")
        soft_mask: bool = Field(False, description="genes outside a program may come in, against alpha_l1")
        alpha_l1: float = Field(0.0, ge=0, description="lasso on weights outside soft masks")
        alpha_l1_epochs: int | None = Field(None, ge=1, description="epochs until alpha_l1 is at its full value")
        n_ext: int = Field(0, ge=0, le=4096, description="new unconstrained terms")
        gamma_ext: float = Field(0.0, ge=0, description="lasso on the weights of unconstrained terms")
        gamma_epochs: int | None = Field(None, ge=1, description="epochs until gamma_ext is at its full value")
        new_programs: Programs = Field({}, description="new constrained terms: programs without the group lasso")
        soft_ext_mask: bool = Field(False, description="as soft_mask, for new_programs")
        use_hsic: bool = Field(False, description="keep unconstrained terms independent of the rest")
        hsic_one_vs_all: bool = Field(False, description="each of them of all others, and not all of them jointly")
        beta: float = Field(1.0, ge=0, description="weight of the HSIC")
        anneal_every: int = Field(5, ge=1, description="epochs between two steps of alpha_l1 and gamma_ext")

        def terms(self) -> list[str]:
            """Names of the latent dimensions, in their order."""
            return [*self.programs, *self.new_programs, *(f"unconstrained_{i}" for i in range(self.n_ext))]

    config: Config
    mask: Tensor
    omega: Tensor

    def __init__(self, config: Config, schema: Schema, *, seed: int = 0) -> None:
        super().__init__(config, schema, seed=seed)
        if not config.programs:
            raise UsageError("--model expimap needs gene programs: give --programs FILE.gmt")
        if config.decoder_last_layer == "softmax" and config.recon_loss == "mse":
            raise UsageError("--model.decoder-last-layer softmax: is for counts, and not for --model.recon-loss mse")
        if config.likelihood_path == "fused" and self._last_layer != "softmax":
            raise UsageError(
                "--model.likelihood-path fused: the kernel takes counts and the softmax of the decoder's output, and "
                f"not --model.recon-loss {config.recon_loss} with --model.decoder-last-layer {self._last_layer}; leave "
                "it at auto"
            )
        _check_names(config, "--model")
        if unknown := config.omega.keys() - config.programs.keys():
            raise UsageError(f"--model.omega: there is no program {sorted(unknown)[0]!r}")
        generator = seeded("expimap", seed)
        sizes, genes, hidden = covariate_sizes(schema, self.name), schema.n_genes, config.hidden_layer_sizes
        trunk = Stack((genes, *hidden), sizes, config, generator, bias=True)
        self.encoder = StackEncoder(trunk, hidden[-1], len(config.programs), generator)
        self.decoder = SplitLinear(len(config.programs), genes, sizes, generator, bias=False)
        self.register_buffer("mask", program_mask(config.programs, schema.genes).T.contiguous())
        # of the settings and not of the weights: not saved, and with values where weights have none yet (meta)
        omega = torch.tensor([config.omega.get(name, 1.0) for name in config.programs], device="cpu")
        self.register_buffer("omega", omega, persistent=False)
        self.theta = None if config.recon_loss == "mse" else dispersion_by_batch(schema, generator)
        self.terms = nn.ModuleDict()
        self._add(list(config.new_programs), CONSTRAINED, ("expimap", seed))
        self._add([f"unconstrained_{i}" for i in range(config.n_ext)], FREE, ("expimap", seed))
        for terms in self.terms.values():
            assert isinstance(terms, Terms)
            terms.settle()
        if not config.soft_mask and not self.mask.is_meta:
            with torch.no_grad():
                self.decoder.weight.mul_(self.mask)

    def _add(self, names: Sequence[str], kind: str, words: Sequence[object]) -> None:
        """Append new terms of one kind."""
        if not names:
            return
        if kind not in self.terms:
            n_hidden = self.encoder.mean.weight.shape[1]
            self.terms[kind] = Terms(kind, n_hidden, self.schema.n_genes).to(self.encoder.mean.weight.device)
            self.terms[kind].requires_grad_(self.encoder.mean.weight.requires_grad)
        terms = self.terms[kind]
        assert isinstance(terms, Terms)
        mask_EG: Tensor | None = None
        if kind == CONSTRAINED:
            mask_EG = program_mask({name: self.config.new_programs[name] for name in names}, self.schema.genes)
        terms.add(names, mask_EG, (*words, kind))
        if terms.genes.new is not None and terms.new_mask is not None and not self.config.soft_ext_mask:
            with torch.no_grad():
                terms.genes.new.mul_(terms.new_mask)

    def extend(self, settings: Mapping[str, Any], *, seed: int) -> None:
        """New terms for a query: `n_ext` unconstrained ones and those of `new_programs`, behind those that are there.

        `use_hsic`, `hsic_one_vs_all`, `beta`, `gamma_ext`, `gamma_epochs`, `alpha_l1` and `alpha_l1_epochs` may be
        set with them, for they act on new terms; `soft_ext_mask` if the reference has no constrained ones. The
        dimensions of the reference stay the first ones.

        Raises:
            UsageError: another setting, a program that is there already, or constrained terms behind unconstrained.
        """
        allowed = {*EXTENDS, *(() if CONSTRAINED in self.terms else ("soft_ext_mask",))}
        if unknown := sorted(settings.keys() - allowed):
            raise UsageError(f"--surgery.model.{unknown[0]}: cannot be changed by surgery; {', '.join(EXTENDS)} can")
        old = self.config
        asked = checked(Expimap.Config, settings, prefix="surgery.model.")
        if twice := sorted(asked.new_programs.keys() & {*old.programs, *old.new_programs}):
            raise UsageError(f"--surgery.model.new-programs: the reference has {twice[0]!r} already")
        if asked.new_programs and FREE in self.terms:
            raise UsageError(
                "--surgery.model.new-programs: the reference has unconstrained terms, and constrained ones would stand "
                "before them; give n_ext alone"
            )
        n_ext, programs = old.n_ext + asked.n_ext, {**old.new_programs, **asked.new_programs}
        changed = {name: getattr(asked, name) for name in settings}
        grown = old.model_copy(update={**changed, "n_ext": n_ext, "new_programs": programs})
        _check_names(grown, "--surgery.model")
        self.config = grown
        self._add(list(asked.new_programs), CONSTRAINED, ("expimap", "surgery", seed))
        self._add([f"unconstrained_{i}" for i in range(old.n_ext, n_ext)], FREE, ("expimap", "surgery", seed))

    @classmethod
    def training_defaults(cls, n_cells: int, *, started: bool = False) -> Mapping[str, Any]:
        """As scArches' tutorial trains it; the warm-up of the KL takes 100 of some 400 epochs there, a quarter here."""
        warm_up = max(1.0, default_epochs(n_cells) // 4)
        return {"optim": {"weight_decay": 0.0, "kl_max": 0.5, "kl_epochs": warm_up}, "data": {"stratify": True}}

    @classmethod
    def query_defaults(cls) -> Mapping[str, Any]:
        """As scArches' tutorial maps: a tenth of the KL's weight at most, reached in 100 epochs."""
        return {"optim": {"kl_max": 0.1, "kl_epochs": 100.0}, "data": {"stratify": True}}

    @property
    def n_latent(self) -> int:
        return len(self.terms_names)

    @property
    def terms_names(self) -> list[str]:
        """Names of the latent dimensions, in their order."""
        return self.config.terms()

    def kinds_of_terms(self) -> Iterator[Terms]:
        """The new terms: constrained ones before unconstrained ones."""
        for kind in (CONSTRAINED, FREE):
            if kind in self.terms:
                terms = self.terms[kind]
                assert isinstance(terms, Terms)
                yield terms

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        """Reconstruction and KL of each cell, and the HSIC of the batch as penalty (scArches' expiMap.forward).

        With `noise=None` latents are their means. The term "elbo" is the negative ELBO with w = 1, without the HSIC.
        """
        x = self.counts_seen(batch)
        size_B = cell_sizes(x, batch, self.schema)
        _, _, z_BL, kl_B = self.latent(size_B, batch, noise, x)

        reconstruction_B = self.reconstruction(x, size_B, self.logits(z_BL, batch), batch)
        terms = {"reconstruction": reconstruction_B, "kl": kl_B, "elbo": reconstruction_B + kl_B}
        penalty: Tensor | None = None
        if self.config.use_hsic and self.config.n_ext:
            each = [self.config.beta * self.dependence(of_one_BL) for of_one_BL in batch.each(z_BL)]
            penalty = torch.stack(each).sum()
            terms["hsic"] = batch.spread(each)
        return Losses(reconstruction_B + step.kl_weight * kl_B, terms, penalty)

    def counts_seen(self, batch: Batch) -> Tensor | Sparse:
        """Counts (B, G) as the likelihood takes them."""
        if self._last_layer != "softmax":
            return batch.counts.dense(self.device)
        return counts_for(batch.counts, self.config.recon_loss, self.decoder.weight, self.config.likelihood_path)

    @property
    def compiled(self) -> bool:
        """As of `AtlasModel`; dependence between terms is torch's work on all pairs of cells."""
        weight, path = self.decoder.weight, self.config.likelihood_path
        plain = self._last_layer == "softmax" and not self.config.use_hsic
        return plain and compiles(self.config.recon_loss, weight, path)

    def encode(
        self, size_B: Tensor, batch: Batch, noise: Noise | None = None, x: Tensor | Sparse | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent; `noise` is used for dropout, in training mode only."""
        return self._moments(self._hidden(size_B, batch, noise, x))

    def latent(self, size_B: Tensor, batch: Batch, noise: Noise | None, x: Tensor | Sparse) -> Latent:
        """The same with a draw and its KL divergence."""
        h_BH = self._hidden(size_B, batch, noise, x)
        if not self.terms:
            encoder = self.encoder
            return latent(h_BH, encoder.mean, encoder.log_variance, noise, encoder.LEAST)
        mean_BL, variance_BL = self._moments(h_BH)
        z_BL = draw(mean_BL, variance_BL, noise)
        return Latent(mean_BL, variance_BL, z_BL, kl_to_standard_normal(mean_BL, variance_BL))

    def _hidden(self, size_B: Tensor, batch: Batch, noise: Noise | None, x: Tensor | Sparse | None) -> Tensor:
        """The encoder's last hidden layer, (B, H)."""
        product_BH = batch.known.get("product")
        seen_BG = self._seen(size_B, batch, x) if product_BH is None else None
        h_BH: Tensor = self.encoder.trunk(seen_BG, covariate_codes(batch), noise, product_BH)
        return h_BH

    def _moments(self, h_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of all programs, new ones behind those of the reference."""
        encoder = self.encoder
        parts = [moments(h_BH, encoder.mean, encoder.log_variance, encoder.LEAST)]
        parts += [terms.encode(h_BH) for terms in self.kinds_of_terms()]
        if len(parts) == 1:
            return parts[0]
        mean_BL, variance_BL = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        return mean_BL, variance_BL

    def logits(self, z_BL: Tensor, batch: Batch, *, transform_batch: int | None = None) -> Logits:
        """The input of the last layer, not computed yet; with `transform_batch` as if every cell were of that batch."""
        codes = covariate_codes(batch)
        if transform_batch is not None:
            codes["batch"] = torch.full_like(batch.batch, transform_batch)
        return logits_of(self.decoder, z_BL, codes, self.gene_weights())

    def decode(self, z_BL: Tensor, batch: Batch, *, transform_batch: int | None = None) -> Tensor:
        """The input of the last layer, (B, G)."""
        return self.logits(z_BL, batch, transform_batch=transform_batch).tensor()

    def decoded(self, z_BL: Tensor, batch: Batch, transform_batch: int | None = None) -> Tensor:
        """What the last layer gives, (B, G)."""
        return self._last(self.decode(z_BL, batch, transform_batch=transform_batch))

    def gene_weights(self) -> Tensor:
        """The decoder's weights (G, L) as they count: 0 outside hard masks."""
        parts = [self.decoder.weight if self.config.soft_mask else self.decoder.weight * self.mask]
        for terms in self.kinds_of_terms():
            parts.append(terms.weight(masked=not self.config.soft_ext_mask).T)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def reconstruction(self, x: Tensor | Sparse, size_B: Tensor, eta: Logits, batch: Batch) -> Tensor:
        """-log p(x | z), or the squared error, summed over genes, (B,)."""
        if self.theta is None:
            assert isinstance(x, Tensor)
            return (self._last(eta.tensor()) - log_normalised(x, size_B, self.config.target_sum)).square().sum(-1)
        path = self.config.likelihood_path
        if self._last_layer == "softmax":
            theta_KG, code_B = self.theta.table(), batch.batch
            return -counts_log_likelihood(x, eta, size_B.log(), theta_KG, None, code_B=code_B, path=path)
        assert isinstance(x, Tensor)
        return -log_likelihood("nb", x, self._last(eta.tensor()), self.theta(batch.batch), path=path)

    @property
    def _last_layer(self) -> str:
        return self.config.decoder_last_layer or ("identity" if self.config.recon_loss == "mse" else "softmax")

    def _last(self, eta_BG: Tensor) -> Tensor:
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "softmax": lambda eta: torch.softmax(eta, -1),
            "softplus": F.softplus,
            "exp": torch.exp,
            "relu": F.relu,
            "identity": lambda eta: eta,
        }
        return functions[self._last_layer](eta_BG)

    def dependence(self, z_BL: Tensor) -> Tensor:
        """HSIC of the unconstrained terms with the rest; or of each of them with all others, summed."""
        first = z_BL.shape[1] - self.config.n_ext
        if not self.config.hsic_one_vs_all:
            return hsic(z_BL[:, first:], z_BL[:, :first])
        places = range(first, z_BL.shape[1])
        others = [torch.cat([z_BL[:, :i], z_BL[:, i + 1 :]], 1) for i in places]
        return torch.stack([hsic(z_BL[:, i : i + 1], rest) for i, rest in zip(places, others, strict=True)]).sum()

    def after_step(self, step: Step) -> None:
        """The proximal operators, in the order of scArches' trainer; of weights that train alone."""
        config, weight = self.config, self.decoder.weight
        l1 = config.alpha_l1 * step.lr * annealed(step.epoch, config.alpha_l1_epochs, config.anneal_every)
        if weight.requires_grad:
            if config.soft_mask and l1:
                shrink_(weight, l1, where=self.mask == 0)
            if config.alpha:
                shrink_groups_(weight, config.alpha * step.lr * self.omega)
        gamma = config.gamma_ext * step.lr * annealed(step.epoch, config.gamma_epochs, config.anneal_every)
        for terms in self.kinds_of_terms():
            free = terms.covariate == FREE
            for genes, mask in ((terms.genes.rows, terms.mask), (terms.genes.new, terms.new_mask)):
                if genes is None or not genes.requires_grad:
                    continue
                if free and gamma:
                    shrink_(genes, gamma)
                elif mask is not None and config.soft_ext_mask and l1:
                    shrink_(genes, l1, where=mask == 0)

    @torch.no_grad()
    def constants(self, batch: Batch) -> dict[str, Tensor]:
        seen_BG = self._seen(cell_sizes(seen(batch.counts, self.device), batch, self.schema), batch)
        return {"product": self.encoder.trunk.first_product(seen_BG)}

    def _seen(self, size_B: Tensor, batch: Batch, x: Tensor | Sparse | None = None) -> Tensor | SeenCounts:
        """What the encoder sees of the counts."""
        mse, weight_HI = self.config.recon_loss == "mse", self.encoder.trunk.first.weight
        return encoder_input(size_B, batch, self.config, mse=mse, x=x, weight_HI=weight_HI)

    @torch.no_grad()
    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent, (B, L) each."""
        return self.encode(cell_sizes(seen(batch.counts, self.device), batch, self.schema), batch)

    @torch.no_grad()
    def active_terms(self) -> Tensor:
        """bool (L,): whether a program has a weight that is not 0; new terms always count as active."""
        active_L = self.gene_weights().ne(0).any(0)
        active_L[len(self.config.programs) :] = True
        return active_L

    @torch.no_grad()
    def directions(self, method: Literal["sum", "counts"] = "sum") -> tuple[Tensor, Tensor]:
        """Whether a higher latent means more expression of a term's genes: sign (L,) in -1, 0, 1, and confidence (L,).

        Args:
            method: the sign of the sum of its weights (confidence 1), or of most of them, in which the confidence is
                the share beyond half, from 0 to 1.
        """
        weight_GL = self.gene_weights()
        if method == "sum":
            sign_L = weight_GL.sum(0).sign()
            return sign_L, sign_L.abs()
        more_L, less_L = (weight_GL > 0).sum(0), (weight_GL < 0).sum(0)
        share_L = more_L / (more_L + less_L).clamp(min=1)
        confidence_L = torch.where(more_L + less_L > 0, (share_L - 0.5).abs() / 0.5, 0.0)
        return (more_L - less_L).sign().float(), confidence_L
