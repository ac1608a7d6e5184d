"""Outputs that users ask of a model, computed batch by batch: for a table in memory, an AnnData, or a file.

A model says what it offers (`AtlasModel.offered`); here names and settings are checked, and one batch of cells is
turned into rows. Draws are a function of the seed, the batch size and a cell's place.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from scarcade.engine.contracts import Batch, Noise
from scarcade.engine.errors import UsageError
from scarcade.engine.schema import Categories
from scarcade.jobs.cells import Cells, refuse_unknown
from scarcade.models.model import AtlasModel, Output


@dataclass(frozen=True)
class Asked:
    """One output of a model, with its settings."""

    model_name: str
    name: str
    output: Output
    columns: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None  # name of the label column, for probabilities

    @property
    def key(self) -> str:
        """Its name in an AnnData."""
        return f"{self.label or self.model_name}_{self.model_name if self.label else self.name}"

    @property
    def place(self) -> str:
        """Where it comes to in an AnnData: ``layers/KEY`` or ``obsm/KEY``."""
        return f"{'layers' if self.output.genes else 'obsm'}/{self.key}"

    @property
    def categories(self) -> Categories | None:
        """The column of obs with the likeliest label, if it is one of labels."""
        return Categories(self.key, self.columns) if self.output.labels else None

    @property
    def decodes(self) -> bool:
        """Whether the cells' own batches matter to the decoder."""
        return self.output.decodes and self.settings.get("transform_batch") is None

    @torch.no_grad()
    def values(self, model: AtlasModel, batch: Batch, noises: Sequence[Noise | None]) -> np.ndarray:
        """float32 (B, columns), averaged over `noises`."""
        draws = [self.output.of(model, batch, noise, **self.settings) for noise in noises]
        mean = torch.stack(draws).mean(0) if len(draws) > 1 else draws[0]
        found: np.ndarray = mean.cpu().numpy()
        return found


def asked_of(model: AtlasModel, names: Sequence[str], settings: Mapping[str, Any]) -> list[Asked]:
    """The outputs `names` of a model; each of the `settings` is given to those that take it.

    Raises:
        UsageError: the model has no such output, or none of them takes a setting.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    found, taken = [], set()
    for name in dict.fromkeys(names):
        if name not in model.offered:
            there_are = f"there are {', '.join(model.offered)}" if model.offered else "it has none"
            raise UsageError(f"{model.name} has no output {name!r}; {there_are}")
        output = model.offered[name]
        own = {key: value for key, value in given.items() if key in settings_of(output)}
        taken |= set(own)
        label = model.schema.labels[0].name if output.labels else None
        found.append(Asked(model.name, name, output, tuple(output.columns(model)), own, label))
    if unknown := sorted(given.keys() - taken):
        takes = sorted({key for one in found for key in settings_of(one.output)})
        remedy = f"there are {', '.join(takes)}" if takes else "there are none"
        if not names and (taking := [name for name, one in model.offered.items() if unknown[0] in settings_of(one)]):
            remedy = f"ask for an output that does: --output {' or --output '.join(taking)}"
        raise UsageError(f"{unknown[0]}: {', '.join(map(repr, names)) or 'the latent'} takes no such setting; {remedy}")
    return found


def settings_of(output: Output) -> list[str]:
    """Names of the settings that an output takes."""
    return [p.name for p in inspect.signature(output.of).parameters.values() if p.kind is p.KEYWORD_ONLY]


def matters(cells: Cells, model: AtlasModel, asked: Sequence[Asked]) -> bool:
    """Whether the batch of these cells has any effect on what is asked; if not, any code will do.

    Raises:
        CategoryError: it has, and some cells are of a batch that the model does not know.
    """
    return refuse_unknown(cells, model, decoding=any(one.decodes for one in asked))


def batches_of(cells: Cells, model: AtlasModel, batch_size: int, *, decoding: bool) -> Iterator[Batch]:
    """All cells in their order, on the model's device.

    Raises:
        CategoryError: as `matters`.
    """
    seen = refuse_unknown(cells, model, decoding=decoding)
    for batch in cells.batches(batch_size):
        if not seen:
            batch = without_batch(batch)
        yield batch.to(model.device)


def without_batch(batch: Batch) -> Batch:
    """The cells with one code for all: where it has no effect, one that the model does not know is no error."""
    return replace(batch, batch=torch.zeros_like(batch.batch))


def noise_of(batch: Batch, model: AtlasModel, seed: int, draw: int = 0) -> Noise:
    """The noise of one draw for the cells of a batch."""
    return Noise([((seed, draw, batch.position.step, batch.position.epoch), len(batch))], model.device)


def noises_of(batch: Batch, model: AtlasModel, seed: int, n_samples: int) -> list[Noise | None]:
    """The noises of `n_samples` draws; without any the latent is its mean."""
    return [noise_of(batch, model, seed, i) for i in range(n_samples)] or [None]
