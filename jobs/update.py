"""Updating a trained reference with new data: what is read of it, how it is grown, and what is kept of its cells.

By surgery only the rows of new batches train, so the latents of the reference's cells stay valid and are carried over;
with all weights training they do not, and are left out. Each update adds an entry to the lineage in ``model.json``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scarcade.dataloaders.aligned import AlignedStore, aligned
from scarcade.dataloaders.store import Store
from scarcade.engine.errors import UsageError
from scarcade.engine.optim import default_epochs
from scarcade.engine.schema import Schema
from scarcade.jobs.as_mapped import as_mapped
from scarcade.jobs.cells import Cells
from scarcade.jobs.embed import write_latent
from scarcade.jobs.latent import LATENT, LatentReader
from scarcade.models.layers import BatchNorm
from scarcade.models.model import AtlasModel
from scarcade.models.saved import lineage_after, read, save
from scarcade.models.surgery import SurgeryConfig, additions, grow, trainable

Weights = Literal["surgery", "all"]
MOST_EPOCHS = 200  # of surgery, as in `map`


@dataclass(frozen=True)
class Update:
    """A reference and the new data, as it sees them."""

    path: Path
    model: AtlasModel
    view: AlignedStore
    weights: Weights

    @property
    def schema(self) -> Schema:
        """That of the updated reference."""
        return self.view.schema

    @property
    def new(self) -> dict[str, tuple[str, ...]]:
        """Covariate -> values that the reference did not know."""
        return {name: values for name, values in self._additions().items() if values}

    def _additions(self) -> dict[str, tuple[str, ...]]:
        return additions(self.model.schema, with_labels(self.schema, self.model.schema))

    def grown(self, surgery: SurgeryConfig, seed: int) -> AtlasModel:
        """The reference with rows for what is new, ready to be trained; `trainable` may be empty."""
        grown = grow(self.model, with_labels(self.schema, self.model.schema), seed=seed, config=surgery)
        grown.schema = self.schema  # with new labels behind the old ones, where no weights belong to them
        if self.weights == "all":
            grown.requires_grad_(True)
            grown.query_mode = None
            for module in grown.modules():
                if isinstance(module, BatchNorm):
                    module.momentum = module.MOMENTUM
        return grown

    def kept(self, n_latent: int) -> LatentReader | None:
        """The latent of the reference's own cells, where it is still right and of `n_latent` dimensions."""
        if self.weights == "all" or not (self.path / LATENT).is_dir():
            return None
        reader = LatentReader(self.path / LATENT)
        there = {column.name: column.values for column in reader.columns}
        wanted = (self.model.schema.batch, *self.model.schema.labels)
        whole = all(there.get(one.name) == one.values for one in wanted)
        return reader if whole and reader.n_latent == n_latent else None

    def lineage(self) -> list[dict[str, Any]]:
        """That of the updated reference: every ancestor, the oldest first, and how it became the next."""
        return lineage_after(self.model, self.weights, self.new)

    def notes(self, surgery: SurgeryConfig) -> list[str]:
        """What a person should know before the update."""
        found = list(self.view.notes)
        for name, values in self.new.items():
            column = self.schema.batch if name == "batch" else self.schema.categorical[int(name.rpartition("_")[2])]
            shown = ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
            found.append(f"new in '{column.name}': {shown}")
        for before, now in zip(self.model.schema.labels, self.schema.labels, strict=True):
            if values := now.values[len(before) :]:
                shown = ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
                found.append(f"new in '{now.name}': {shown}")
        grown = self.grown(surgery, 0)
        if not trainable(grown):
            found.append("nothing trains: the reference knows every batch, or has no weights of a batch")
        if self.kept(grown.n_latent) is None:
            why = {
                "all": "all weights train, so the latents of the reference's cells are no longer right",
                "surgery": f"{self.path / LATENT} is not there, or has other columns or dimensions",
            }[self.weights]
            found.append(
                f"{why}: the updated reference holds the latents of the new data alone, and labels are transferred "
                "from those; train on a store that holds the old cells too (ingest --append) to have theirs"
            )
        return found


def update_of(
    path: str | Path, store: Store, *, weights: Weights, min_genes: float, model: AtlasModel | None = None
) -> Update:
    """The reference in the folder `path` (`model`, if it is read already), and `store` in its genes and codes.

    Raises:
        OpenError, CorruptError, ModelFileError: `path` is no intact model. GenesError: too few genes in common.
        CategoryError: a covariate that the store lacks, or a label that is new where labels are fixed.
    """
    model = model or read(path)
    labels: Literal["add", "refuse"] = "refuse" if model.labels_are_fixed else "add"
    return Update(Path(path), model, aligned(store, model.schema, min_genes=min_genes, new_labels=labels), weights)


def training_defaults(model: AtlasModel, weights: Weights, n_cells: int) -> list[dict[str, Any]]:
    """Settings of training that go before those given: by surgery as `map` has them, else as in training."""
    if weights == "all":
        return [dict(model.training_defaults(n_cells, started=True))]
    epochs = min(MOST_EPOCHS, default_epochs(n_cells))
    return [{"optim": {"epochs": epochs, "weight_decay": 0.0}}, dict(model.query_defaults())]


def with_labels(schema: Schema, reference: Schema) -> Schema:
    """`schema` with the labels of `reference`."""
    return Schema.from_dict(schema.to_dict() | {"labels": reference.to_dict()["labels"]})


def save_as(
    model: AtlasModel, folder: Path | None, out: Path, cells: Cells | None, *, batch_size: int, replace: bool
) -> Path:
    """Write a model that was read from `folder`, and perhaps grown by a delta, as a model of its own.

    Raises:
        UsageError: it has more latent dimensions than the cells of the reference have values.
        CategoryError: as `as_mapped`; nothing is written.
    """
    cells = None if cells is None else as_mapped(cells, model)
    record = dict(model.record or {})
    training = dict(record.get("training", {}))
    before = LatentReader(folder / LATENT) if folder is not None and (folder / LATENT).is_dir() else None
    if before is not None and before.n_latent != model.n_latent:
        raise UsageError(
            f"{out}: surgery added {model.n_latent - before.n_latent} latent dimensions, for which the reference's "
            "cells have no values; train a new reference to have them"
        )

    def latent(work: Path) -> None:
        if before is None and cells is None:
            return
        columns = [] if before is None else [column.name for column in before.columns]
        known = {one.name: one for one in (model.schema.batch, *model.schema.labels)}
        wanted = [known[name] for name in columns if name in known] or list(known.values())
        write_latent(
            model,
            cells.loader(batch_size) if cells is not None else None,
            work / LATENT,
            columns=[(one, cells.codes_of(one) if cells is not None else np.zeros(0, np.int8)) for one in wanted],
            about={"model_name": model.name, "before": None if before is None else before.about},
            before=before,
        )

    save(
        model,
        out,
        training=training,
        data_fingerprint=record.get("data_fingerprint") or training.get("query_hash"),
        lineage=record.get("lineage", ()),
        replace=replace,
        beside=latent,
    )
    return out
