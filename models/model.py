"""What every model is: the floor of what training, surgery, mapping and users need of one, with defaults.

A model overrides what it has of its own; its loss is all in its own file. To add a model: one file with a
subclass of `AtlasModel`, one line in `MODELS`, its tests. Nothing else knows models by their names.

Shapes: B cells, L latent dimensions, C classes of the primary label.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from scarcade.engine.config import Section
from scarcade.engine.contracts import Batch, Losses, Noise, Step
from scarcade.engine.errors import CategoryError, UsageError
from scarcade.engine.schema import Schema
from scarcade.models.distributions import draw


@dataclass(frozen=True, slots=True)
class Output:
    """A table that users ask of a model: a row for each cell (`Trained.output`).

    `of(model, batch, noise, **settings)` gives the rows (B, columns); with ``noise=None`` the latent is its mean.
    """

    of: Callable[..., Tensor]
    columns: Callable[[Any], Sequence[str]]  # of the model: names of the columns
    about: str  # one sentence for `help`
    decodes: bool = True  # whether a cell's batch matters even if the encoder does not see it
    genes: bool = False  # a column for each gene: a layer of AnnData, else an entry of obsm
    labels: bool = False  # a probability for each class: the likeliest becomes a column of obs


PROBABILITIES = Output(
    of=lambda model, batch, noise: model.predict_labels(batch),
    columns=lambda model: model.schema.labels[0].values,
    about="Probability of each class, by the model's own classifier.",
    decodes=False,
    labels=True,
)

Where = str | int | Sequence[str | int] | None
"""Batches to decode cells in, by name or code; None: each cell's own."""


class AtlasModel(nn.Module):
    """A model of single cells. Subclasses give `name`, `obsm_key`, `Config`, `losses` and `embed`, at least."""

    name: ClassVar[str]  # on the command line: "scvi"
    obsm_key: ClassVar[str]  # of its latent in AnnData: "X_scVI"
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings of `Config` (``--recipe``)."""
    training_recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings of `TrainConfig` that go with a recipe: ``{"transfer": {"data": {"stratify": True}}}``."""
    outputs: ClassVar[Mapping[str, Output]] = {}
    """What else users may ask of it, by name."""
    labelled_beside: ClassVar[bool] = False
    """Whether `Batch.labelled` is wanted: labelled cells beside the others, in training and validation."""
    recordable: ClassVar[bool] = False
    """Whether a step of its training is the same work on a GPU whatever the values, and `losses` takes nothing from its
    `Step` but the KL weight (`engine.recorded`)."""
    sees_proteins: ClassVar[bool] = False
    """Whether the model is of proteins beside genes."""
    decoder_norms: ClassVar[tuple[str, ...]] = ("decoder.norm.",)
    """Beginnings of the names of the batch norm weights that `train_decoder_norm` lets surgery train."""

    fingerprint: str | None = None
    """sha256 over the model's files, of a model that was read from disk."""
    record: Mapping[str, Any] | None = None
    """The content of its ``model.json``."""
    extension: Mapping[str, Any] = {}
    """What `extend` added to the reference, as its settings; kept beside a delta."""

    class Config(Section):
        """Architecture of the model. Those of subclasses derive from this one."""

    def __init__(self, config: Any, schema: Schema, *, seed: int = 0) -> None:
        """`config` is a `Config` of the class. First weights are a pure function of (config, schema sizes, seed).

        Raises:
            UsageError: the configuration needs something that the schema does not have.
        """
        super().__init__()
        self.config: Any = config
        self.schema = schema
        self.query_mode: Literal["eval", "train"] | None = None  # set by surgery
        self.is_grown = False  # set by surgery: what `observe` found of the reference's own batches stays

    @property
    def compiled(self) -> bool:
        """Whether what is large in its steps on a CPU is compiled, and shared out to threads by itself."""
        return False

    @classmethod
    def training_defaults(cls, n_cells: int, *, started: bool = False) -> Mapping[str, Any]:
        """Settings of `TrainConfig` that go before its defaults: ``{"optim": {"lr": 4e-3}}``.

        Args:
            n_cells: of the data. started: whether the weights come from a trained model (``--init-from``).
        """
        return {}

    @classmethod
    def query_defaults(cls) -> Mapping[str, Any]:
        """Settings of `MapConfig` that go before its defaults."""
        return {}

    @property
    def reads(self) -> Schema:
        """What is read of a query's cells: all of the schema but proteins, unless the model sees them."""
        return self.schema if self.sees_proteins else replace(self.schema, proteins=())

    @property
    def data_notice(self) -> str | None:
        """What to tell before training if there is little that the model can learn from such data."""
        return None

    @property
    def n_latent(self) -> int:
        """Dimensions of what `embed` returns."""
        return int(self.config.n_latent)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def offered(self) -> Mapping[str, Output]:
        """`outputs`, and the classifier's probabilities where there is one."""
        return {**self.outputs, "probabilities": PROBABILITIES} if self.classifies else self.outputs

    @property
    def labels_are_fixed(self) -> bool:
        """Whether weights belong to the labels, so that an update cannot add any."""
        return self.classifies

    @property
    def encodes_batch(self) -> bool:
        """Whether the latent of a cell depends on its batch."""
        return True

    @property
    def surgery_notice(self) -> str | None:
        """What to tell before training and before mapping, if surgery cannot move this model's cells."""
        return None

    @property
    def couples(self) -> str | None:
        """Why queries cannot train together on this model, though each has rows of its own; None if they can."""
        return None

    def train(self, mode: bool = True) -> Self:
        """In query mode "eval" surgery trains as scvi-tools does: no dropout, running batch statistics."""
        return super().train(mode and self.query_mode != "eval")

    def forward(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        """`losses`, as the call of a torch module."""
        return self.losses(batch, step, noise)

    def losses(self, batch: Batch, step: Step, noise: Noise | None) -> Losses:
        """The loss of each cell. With `noise=None` every latent is its mean and nothing is dropped."""
        raise NotImplementedError

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latent, each (B, L)."""
        raise NotImplementedError

    def draw(self, batch: Batch, noise: Noise | None) -> Tensor:
        """A draw of the latent as users see it, (B, L); with ``noise=None`` its mean."""
        return draw(*self.embed(batch), noise)

    def marginal_log_likelihood(self, batch: Batch, noise: Noise, n_samples: int) -> Tensor:
        """log p(x) of each cell by importance sampling, (B,).

        Raises:
            UsageError: the model has no such function.
        """
        raise UsageError(f"{self.name} has no marginal likelihood")

    def constants(self, batch: Batch) -> dict[str, Tensor]:
        """What of each cell stays the same in every epoch while the reference is frozen, by name, each (B, ...).

        Given back as `Batch.known`, it is not computed again. "product" is what the encoder's first weights make of
        the counts. A model that says nothing is computed as a whole.
        """
        return {}

    def batch_codes(self, where: Where) -> list[int | None]:
        """The codes of the batches to decode in.

        Raises:
            CategoryError: the model does not know such a batch. UsageError: none is named.
        """
        if where is None:
            return [None]
        values, codes = self.schema.batch.values, self.schema.batch.codes()
        named = [where] if isinstance(where, str | int) else list(where)
        if not named:
            raise UsageError("transform_batch: no batch is named; give one or more, or None for each cell's own")
        for one in named:
            if one not in codes and not (isinstance(one, int) and 0 <= one < len(values)):
                raise CategoryError(
                    f"transform_batch: the model does not know the batch {one!r}; it knows {', '.join(values)}"
                )
        return [codes[one] if isinstance(one, str) else one for one in named]

    def after_growth(self) -> None:
        """Called when surgery has added rows, for what of the configuration depends on how many there are."""

    def after_step(self, step: Step) -> None:
        """Called after every update (proximal operators); most models do nothing."""

    @property
    def observes(self) -> bool:
        """Whether `observe` must be called once before training."""
        return False

    def observe(self, batches: Iterable[Batch], total: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        """One pass over the data for what depends on all of it; `total` adds a tensor up over all workers."""

    @property
    def classifies(self) -> bool:
        """Whether the model has a classifier of its own for the primary label."""
        return False

    def predict_labels(self, batch: Batch) -> Tensor:
        """Probabilities of the classes, (B, C).

        Raises:
            UsageError: the model has no classifier.
        """
        raise UsageError(f"{self.name} has no classifier; labels are transferred from neighbours (`map`)")

    def extend(self, settings: Mapping[str, Any], *, seed: int) -> None:
        """Add what surgery may add beyond rows of new conditions (``SurgeryConfig.model``); all of it trainable.

        Tensors that are added are named ``new...`` within their module.

        Raises:
            UsageError: there is no such thing to add.
        """
        raise UsageError(f"--surgery.model: {self.name} adds nothing but rows of conditions")

    @classmethod
    def config_from(cls, other: "AtlasModel") -> Mapping[str, Any]:
        """The fields of `Config` that a model must share with `other` to start from it (``--init-from``).

        Raises:
            UsageError: there is no way from that model to this one.
        """
        raise UsageError(
            f"--init-from: {cls.name} cannot start from {other.name}; leave it out, or give a "
            "reference that is to learn new data as --update"
        )

    def start_from(self, other: "AtlasModel") -> None:
        """Take the weights of `other`, of whose `config_from` this model was built.

        Raises:
            GenesError, CategoryError: it was trained on other genes or conditions.
        """
        raise UsageError(f"--init-from: {self.name} cannot start from {other.name}")
