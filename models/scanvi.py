"""scANVI: scVI with a classifier, for cells of which some have labels (Xu et al. 2021, Mol Syst Biol 17).

    p(z1 | z2, y) = Normal(m(z2, y), v(z2, y));  p(z2) = Normal(0, I);  q(y | z1) = softmax(classifier(z1))

The ELBO is marginalised over the classes, of labelled cells too; labels enter by a cross entropy on a minibatch of
labelled cells of its own (`Batch.labelled`). The function, the defaults and the first weights' distribution are
those of scvi-tools 1.4.2 (tests/parity). The number of classes is always that of the schema's primary label.

Shapes: B cells, M labelled cells, G genes, L latent dimensions, C classes, N = B C rows, cell by cell.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.engine.errors import CategoryError, GenesError, UsageError
from scarcade.engine.optim import default_epochs
from scarcade.engine.schema import Schema
from scarcade.models.distributions import log_normal
from scarcade.models.layers import Codes, Encoder, FullyConnected, Linear, seeded
from scarcade.models.model import AtlasModel
from scarcade.models.normal import log_density, moments
from scarcade.models.scvi import Scvi, Where


class Scanvi(Scvi):
    """The model. What scVI has is as there; `losses` is the objective."""

    name: ClassVar[str] = "scanvi"
    obsm_key: ClassVar[str] = "X_scANVI"
    labelled_beside: ClassVar[bool] = True
    training_recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "transfer": {
            "data": {"stratify": True, "samples_per_label": 100, "edit_labels": True},
            "optim": {"epochs": 20},
        }
    }
    decoder_norms: ClassVar[tuple[str, ...]] = ("decoder.norm.", "z1_decoder.trunk.norm.")

    class Config(Scvi.Config):
        """Architecture of scANVI. Defaults are those of scvi-tools."""

        latent_distribution: Literal["normal"] = Field("normal", description="scANVI is defined for normal alone")
        linear_classifier: bool = Field(False, description="the classifier is one linear layer")
        classifier_layers: int | None = Field(None, ge=1, le=64, description="its hidden layers; default: n_layers")
        classifier_hidden: int | None = Field(None, ge=1, le=65536, description="their units; default: n_hidden")
        classifier_dropout: float | None = Field(None, ge=0, lt=1, description="default: dropout_rate")
        classification_ratio: float = Field(50.0, ge=0, description="weight of the cross entropy beside the ELBO")

    config: Config

    def __init__(self, config: Config, schema: Schema, *, seed: int = 0) -> None:
        super().__init__(config, schema, seed=seed)
        if not schema.n_labels:
            have = f"no cell has one in '{schema.labels[0].name}'" if schema.labels else "the data have no label column"
            raise UsageError(f"scanvi needs labels: {have} (ingest with --label-key)")
        generator = seeded("scanvi", seed)
        latent, hidden, classes = config.n_latent, config.n_hidden, schema.n_labels

        def trunk(
            part: Literal["encoder", "decoder"], sizes: Mapping[str, int], n_hidden: int, n_layers: int, dropout: float
        ) -> FullyConnected:
            norms: tuple[Where, ...] = (part, "both")
            return FullyConnected(
                latent,
                n_hidden,
                n_layers,
                sizes,
                inject=True,
                dropout_rate=dropout,
                batch_norm=config.use_batch_norm in norms,
                layer_norm=config.use_layer_norm in norms,
                generator=generator,
            )

        given = {"label": classes}
        body, width = None, latent
        if not config.linear_classifier:
            width = config.classifier_hidden or hidden
            dropout = config.dropout_rate if config.classifier_dropout is None else config.classifier_dropout
            body = trunk("encoder", {}, width, config.classifier_layers or config.n_layers, dropout)
        self.classifier = Classifier(body, width, classes, generator)
        self.z2_encoder = Encoder(
            trunk("encoder", given, hidden, config.n_layers, config.dropout_rate), hidden, latent, generator
        )
        self.z1_decoder = LatentDecoder(
            trunk("decoder", given, hidden, config.n_layers, 0.0), hidden, latent, generator
        )
        self.label_prior: Tensor
        self.register_buffer("label_prior", torch.full((classes,), 1.0 / classes))

    @classmethod
    def training_defaults(cls, n_cells: int, *, started: bool = False) -> Mapping[str, Any]:
        """After scVI a few epochs are enough: a third of its own, and 10 at most (scvi-tools)."""
        return {"optim": {"epochs": min(10, max(2, round(default_epochs(n_cells) / 3)))}} if started else {}

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        """Negative ELBO of each cell, and the cross entropy of each labelled cell beside them.

            -log p(x | z1) + log q(z1 | x) - sum_c q(c | z1) log p(z1 | z2_c, c)
            + w * (sum_c q(c | z1) KL(q(z2 | z1, c) || N(0, I)) + KL(q(y | z1) || prior) + KL(library))

        With `noise=None` latents are their means. The term "elbo" is the negative ELBO with w = 1.
        """
        x = self.counts_seen(batch)
        q = self.encode(x, batch, noise)
        z1_BL, log_library_B1 = self.draw_latent(q, noise)
        reconstruction_B = -self.log_p(x, z1_BL, log_library_B1, batch)

        log_y_BC = F.log_softmax(self.classifier(z1_BL, noise), -1)
        y_BC = log_y_BC.exp()
        log_z1_BC, kl_z2_BC = self.each_class(z1_BL, noise)
        z1_B = log_normal(z1_BL, q.mean_BL, q.variance_BL).sum(-1) - (y_BC * log_z1_BC).sum(-1)
        kl_B = (y_BC * (kl_z2_BC + log_y_BC - self.label_prior.log())).sum(-1)

        terms = {"reconstruction": reconstruction_B, "z1": z1_B, "kl": kl_B}
        elbo_B = reconstruction_B + z1_B + kl_B
        if self.latent_library:
            kl_library_B = terms["kl_library"] = self.library_kl(q, batch)
            kl_B, elbo_B = kl_B + kl_library_B, elbo_B + kl_library_B
        terms["elbo"] = elbo_B
        losses = Losses(reconstruction_B + z1_B + step.kl_weight * kl_B, terms)
        if batch.labelled is not None:
            logits_MC = self.classify(batch.labelled, noise.labelled if noise is not None else None)
            truth_M = batch.labelled.labels
            entropy_M = F.cross_entropy(logits_MC, truth_M, reduction="none")
            losses.labelled = self.config.classification_ratio * entropy_M
            right_M = (logits_MC.argmax(-1) == truth_M).to(entropy_M.dtype)
            losses.labelled_terms = {"classification": entropy_M, "accuracy": right_M}
        return losses

    def each_class(self, z1_BL: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """log p(z1 | z2_c, c) and KL(q(z2 | z1, c) || N(0, I)) as if every cell were of class c, (B, C) each.

        The rows of all classes are one batch of batch norm, as in scvi-tools.
        """
        n_cells, n_classes = len(z1_BL), self.schema.n_labels
        z1_NL = z1_BL.repeat_interleave(n_classes, 0)
        codes = {"label": torch.arange(n_classes, device=z1_BL.device).repeat(n_cells)}
        of_each = None if noise is None else NoiseOfClasses(noise, n_classes)
        z2 = self.z2_encoder.latent(z1_NL, codes, of_each)
        log_z1_N = self.z1_decoder.log_density(z1_NL, z2.z_BL, codes)
        return log_z1_N.view(n_cells, n_classes), z2.kl_B.view(n_cells, n_classes)

    def classify(self, batch: Batch, noise: Noise | None = None) -> Tensor:
        """The classifier's logits at the mean of the latent, (B, C); `noise` is for dropout."""
        x_BI = self.encoder_input(batch, kind=self.encoder.trunk.kind)
        mean_BL, _ = self.encoder(x_BI, self.codes(batch), noise)
        logits_BC: Tensor = self.classifier(mean_BL, noise)
        return logits_BC

    @property
    def data_notice(self) -> str | None:
        if self.schema.n_labels > 1:
            return None
        column = self.schema.labels[0]
        return (
            f"all labels in '{column.name}' are {column.values[0]!r}: the classifier has nothing to tell apart (if "
            "that means no label, ingest with --unlabelled)"
        )

    @property
    def classifies(self) -> bool:
        return True

    @torch.no_grad()
    def predict_labels(self, batch: Batch) -> Tensor:
        """Probabilities of the classes at the mean of the latent, (B, C)."""
        return torch.softmax(self.classify(batch), -1)

    @classmethod
    def config_from(cls, other: AtlasModel) -> Mapping[str, Any]:
        """All of scVI's fields; of a scANVI model also the classifier's shape."""
        if type(other) not in (Scvi, Scanvi):
            raise UsageError(
                f"--init-from: scanvi starts from a scvi or a scanvi model, and not from a {other.name} model"
            )
        if other.config.latent_distribution != "normal":
            raise UsageError("--init-from: scanvi is not defined for a model with latent_distribution ln")
        free = ("likelihood_path", "classification_ratio")  # they change no weight
        return {name: value for name, value in other.config.model_dump().items() if name not in free}

    def start_from(self, other: AtlasModel) -> None:
        ours, theirs = self.schema, other.schema
        if ours.genes != theirs.genes:
            raise GenesError("--init-from: the model was trained on other genes, or on the same in another order")
        for name in ("batch", "categorical", "continuous", "size_factor"):
            if getattr(ours, name) != getattr(theirs, name):
                raise CategoryError(f"--init-from: the data and the model have not the same {name}")
        if (self.config.dispersion == "gene-label" or isinstance(other, Scanvi)) and ours.labels[:1] != theirs.labels[
            :1
        ]:
            raise CategoryError("--init-from: the data and the model have not the same labels")
        self.load_state_dict(self.state_dict() | other.state_dict())


class Classifier(nn.Module):
    """z1 -> logits of the classes; without a trunk it is linear."""

    def __init__(self, trunk: FullyConnected | None, n_in: int, n_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = Linear(n_in, n_classes, generator)

    def forward(self, z1_BL: Tensor, noise: Noise | None) -> Tensor:
        logits_BC: Tensor = self.head(z1_BL if self.trunk is None else self.trunk(z1_BL, {}, noise))
        return logits_BC


class LatentDecoder(nn.Module):
    """z2 and class -> mean and variance of z1; nothing is added to the variance."""

    def __init__(self, trunk: FullyConnected, n_hidden: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.trunk = trunk
        self.mean = Linear(n_hidden, n_out, generator)
        self.variance = Linear(n_hidden, n_out, generator)

    def forward(self, z2_NL: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
        return moments(self.trunk(z2_NL, codes, None), self.mean, self.variance, 0.0)

    def log_density(self, z1_NL: Tensor, z2_NL: Tensor, codes: Codes) -> Tensor:
        """log p(z1 | z2, class) of each row, (N,)."""
        return log_density(z1_NL, self.trunk(z2_NL, codes, None), self.mean, self.variance)


class NoiseOfClasses(Noise):
    """The noise of N = B C rows, cell by cell: each cell draws that of all its classes from its own lane."""

    def __init__(self, noise: Noise, n_classes: int) -> None:
        self.device, self._noise, self._classes = noise.device, noise, n_classes

    @property
    def n_cells(self) -> int:
        return self._noise.n_cells * self._classes

    def normal(self, *features: int) -> Tensor:
        return self._noise.normal(self._classes, *features).view(-1, *features)

    def uniform(self, *features: int) -> Tensor:
        return self._noise.uniform(self._classes, *features).view(-1, *features)
