"""One query onto one reference: grow, train the growth, embed, transfer labels; all but the files it ends in.

Most queries train among others (`member_of`), some alone (`train_alone`); the rest is each query's own. What becomes of
a query is a function of (reference, query, settings): it comes out the same in any company.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scarcade.dataloaders.counts import Csr
from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import CellLoader, LoaderConfig, of_source
from scarcade.dataloaders.query_counts import QuerySource, source_of
from scarcade.dataloaders.schema import Query
from scarcade.dataloaders.stratified import stratified
from scarcade.engine.loop import fit
from scarcade.engine.pack import Member
from scarcade.engine.schema import Categories, Schema
from scarcade.engine.scores import label_accuracy
from scarcade.engine.state import FitResult
from scarcade.engine.world import World
from scarcade.jobs.cells import batch_columns
from scarcade.jobs.embed import latent_of
from scarcade.jobs.label_transfer import Prediction
from scarcade.jobs.query_notes import notes_of
from scarcade.jobs.query_settings import QueryData, QueryOptim, QuerySurgery
from scarcade.jobs.reference import Reference
from scarcade.models.model import AtlasModel
from scarcade.models.packed import rows_of, why_alone
from scarcade.models.surgery import SurgeryConfig, additions, grow, trainable

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Classified:
    """Labels of n cells by the classifier of a model."""

    column: Categories
    by: str  # name of the model
    probabilities: np.ndarray  # float32 (n, C)

    @property
    def codes(self) -> np.ndarray:
        """The likeliest class of each cell (n,)."""
        codes: np.ndarray = self.probabilities.argmax(axis=1) if len(self.probabilities) else np.zeros(0, np.int64)
        return codes


@dataclass(frozen=True)
class Mapped:
    """What became of a query: results of its n cells, and the model grown for it."""

    model: AtlasModel
    mean: np.ndarray  # float32 (n, L)
    variance: np.ndarray  # float32 (n, L)
    classified: Classified | None  # what the model's own classifier says, where it has one
    predictions: list[Prediction]
    distance: np.ndarray | None  # float32 (n,), 1: the edge of the reference
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    new: dict[str, tuple[str, ...]] = field(default_factory=dict)  # covariate -> categories that surgery added
    notes: tuple[str, ...] = ()


def grown_schema(reference: Schema, query: Query) -> Schema:
    """The reference's schema with the query's new batches (and covariates' values) behind the old ones."""
    return replace(
        reference,
        batch=reference.batch.extended(list(query.batch)),
        categorical=tuple(
            column.extended(list(values))
            for column, values in zip(reference.categorical, query.categorical, strict=True)
        ),
    )


@dataclass(frozen=True)
class Prepared:
    """A query whose reference is grown for it: all that its training needs."""

    query: Query
    schema: Schema
    grown: AtlasModel  # shares every tensor but the new rows with the reference
    source: QuerySource  # its cells, held in memory or streamed: the same to whoever reads them
    new: dict[str, tuple[str, ...]]
    trains: bool
    notes: tuple[str, ...]

    def loader(self, data: LoaderConfig, split: Literal["train", "validation"], seed: int) -> CellLoader:
        """Its cells of a split, as they are dealt out in training; without labelled cells beside them."""
        cells = of_source(self.source, split, data, seed=seed)
        return stratified(cells, seed=seed) if data.stratify and split == "train" else cells

    def loaders(self, data: LoaderConfig, seed: int) -> tuple[CellLoader, CellLoader | None]:
        """Those of training and, if cells are held out, of validation."""
        train = self.loader(data, "train", seed)
        held_out = data.validation > 0 and train.n_cells < self.query.n_cells
        return train, self.loader(data, "validation", seed) if held_out else None


def prepared(reference: Reference, query: Query, surgery: QuerySurgery, *, seed: int) -> Prepared:
    """Grow the reference for `query`. New batches become rows that alone are trained.

    A batch that the reference knows keeps the reference's rows; a query of known batches alone is not trained at all.

    Raises:
        CategoryError, GenesError: the query does not fit.
    """
    schema = grown_schema(reference.schema, query)
    new = {name: values for name, values in additions(reference.schema, schema).items() if values}
    grown = grow(reference.model, schema, seed=seed, config=SurgeryConfig(**_common(surgery)), share=True)
    codes = schema.batch.codes()
    columns = batch_columns(query, np.array([codes[value] for value in query.batch], np.int64), schema)
    grew = bool(trainable(grown))
    moves = grew and (reference.model.surgery_notice is None or surgery.train_decoder)
    notes = tuple(notes_of(reference, query, new, surgery, grew))
    trains = bool(query.n_cells and (new or surgery.model) and moves)
    source = source_of(query.counts, columns, schema, seed=seed, keys=query.keys)
    return Prepared(query, schema, grown, source, new, trains, notes)


def member_of(
    one: Prepared,
    *,
    data: QueryData,
    surgery: QuerySurgery,
    seed: int,
    parts: int = 1,
    progress: Report | None = None,
) -> Member | None:
    """`one` as a query that can train among others (`engine.pack`); None if it has to be alone.

    Args:
        parts: in which its batches are to be computed (``--optim.accumulate``): those of a pack are not parted.
    """
    beside = parts > 1 or (one.grown.labelled_beside and surgery.use_labels)
    if not one.trains or beside or why_alone(one.grown) is not None:
        return None
    if isinstance(one.query.counts, Csr):
        data = data.model_copy(update={"read_ahead": False})  # there is nothing to wait for
    train, validation = one.loaders(data, seed)
    return Member(one.query.name, rows_of(one.grown), train, validation, seed, constants_of(one, data), progress)


def constants_of(one: Prepared, data: QueryData) -> dict[str, Tensor]:
    """What of every cell stays the same while it is trained; nothing if that is too much to keep."""
    known: dict[str, Tensor] = {}
    config = LoaderConfig(batch_size=1024, validation=0.0, window=8192, memory=data.memory, read_ahead=False)
    for batch in of_source(one.source, "all", config, seed=0, lanes=1, shuffle=False).epoch(0):
        found = one.grown.constants(batch)
        if not known and sum(value.nbytes for value in found.values()) * one.query.n_cells > data.memory // 4 * len(
            batch
        ):
            return {}
        for name, values in found.items():
            if name not in known:
                known[name] = values.new_empty(one.query.n_cells, *values.shape[1:])
            known[name][torch.from_numpy(batch.rows)] = values
    return known


def train_alone(
    one: Prepared,
    *,
    optim: QueryOptim,
    data: QueryData,
    surgery: QuerySurgery,
    seed: int,
    world: World | None = None,
    progress: Report | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Train a query on a copy of its own, by the loop that trains references.

    Raises:
        NonFiniteError: its training is not finite.
    """
    beside = one.grown.labelled_beside and surgery.use_labels
    loaders = [
        with_labelled(cells, data, seed=seed) if beside and cells is not None else cells
        for cells in one.loaders(data, seed)
    ]
    train, validation = loaders
    assert train is not None
    return fit(one.grown, train, validation, optim, world=world, seed=seed, progress=progress, stop=stop)


def map_query(
    reference: Reference,
    query: Query,
    *,
    optim: QueryOptim,
    data: QueryData,
    surgery: QuerySurgery,
    seed: int,
    world: World | None = None,
    progress: Report | None = None,
) -> Mapped:
    """Place the cells of `query` in the latent space of `reference`, trained alone.

    Raises:
        CategoryError, GenesError: the query does not fit. NonFiniteError: its training or latent is not finite.
    """
    one = prepared(reference, query, surgery, seed=seed)
    if not one.trains:
        return finished(reference, one, data=data)
    result = train_alone(one, optim=optim, data=data, surgery=surgery, seed=seed, world=world, progress=progress)
    return finished(reference, one, data=data, history=result.history, steps=result.steps)


def finished(
    reference: Reference,
    one: Prepared,
    *,
    data: QueryData,
    history: Sequence[Mapping[str, Any]] = (),
    steps: int = 0,
) -> Mapped:
    """Embed the cells of a query that is trained, and carry labels over.

    Raises:
        NonFiniteError: its latent is not finite.
    """
    mean, variance, probabilities = _embedded(one.grown, one.source, data)
    transfer = reference.transfer
    shared = mean[:, : reference.model.n_latent]  # without terms that surgery added
    predictions, distance = transfer.of(shared) if transfer else ([], None)
    name = one.grown.name
    return Mapped(
        model=one.grown,
        mean=mean,
        variance=variance,
        classified=None if probabilities is None else Classified(one.schema.labels[0], name, probabilities),
        predictions=predictions,
        distance=distance,
        history=[dict(line) for line in history],
        steps=steps,
        new=one.new,
        notes=one.notes,
    )


def known_accuracy(reference: Schema, query: Query, predictions: list[Prediction]) -> dict[str, dict[str, float]]:
    """``accuracy, macro_f1, n_cells, n_unknown`` of each predicted column for which the query has labels of its own.

    Scored are the cells whose own label the reference has too; `n_unknown` counts those whose label it has not.
    """
    scores: dict[str, dict[str, float]] = {}
    places = {column.name: place for place, column in enumerate(reference.labels)}
    for prediction in predictions:
        place = places[prediction.column.name]
        truth = query.labels[place]
        known = int((truth >= 0).sum())
        if known:
            named = sum(value is not None for value in query.label_text[place])
            scores[prediction.column.name] = {
                **label_accuracy(truth, prediction.codes),
                "n_cells": known,
                "n_unknown": named - known,
            }
    return scores


def _embedded(
    model: AtlasModel, source: QuerySource, data: LoaderConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Mean and variance of every cell, in the query's order, and what the model's classifier says of it.

    Cells are read in the order of their keys, in which they lie on the disk where they are streamed.
    """
    n, width = source.n_cells, model.n_latent
    mean, variance = (np.empty((n, width), np.float32) for _ in range(2))
    probabilities = np.empty((n, source.schema.n_labels), np.float32) if model.classifies else None
    if n:
        size = max(1024, data.batch_size)
        config = LoaderConfig(
            batch_size=size, validation=0.0, window=8 * size, memory=data.memory
        )  # nothing to shuffle
        model.eval()
        for batch in of_source(source, "all", config, seed=0, lanes=1, shuffle=False).epoch(0):
            mean[batch.rows], variance[batch.rows] = latent_of(model, batch)
            if probabilities is not None:
                probabilities[batch.rows] = model.predict_labels(batch.to(model.device)).cpu().numpy()
    return mean, variance, probabilities


def _common(surgery: QuerySurgery) -> dict[str, Any]:
    return {name: getattr(surgery, name) for name in SurgeryConfig.model_fields}
