"""What a search can search by: the losses of held-out cells, and scores of how well a model integrates and labels.

Losses come from the training's own lines. The scores here are those of a fixed sample of cells (`tune_cells`), so those
of two trials differ by their models alone; all of them together take half a second (2,000 genes, one core) each time,
on a store of any size. Definitions: `engine.scores`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from scarcade.dataloaders.store import Store
from scarcade.engine.errors import UsageError
from scarcade.engine.neighbours import Neighbours
from scarcade.engine.scores import integration, label_accuracy
from scarcade.jobs.embed import latent_of
from scarcade.jobs.label_transfer import votes
from scarcade.jobs.train_config import TrainConfig
from scarcade.jobs.tune_cells import SHARE, FixedCells, learnt_cells, scored_cells
from scarcade.models.model import AtlasModel

K = 15  # neighbours that vote for a label


class Metric(NamedTuple):
    """Something that a search can search by."""

    description: str
    mode: Literal["min", "max"]


LOSSES: Mapping[str, Metric] = {
    "elbo": Metric("negative ELBO of the held-out cells (not of scgen, which has none)", "min"),
    "reconstruction": Metric("reconstruction loss of the held-out cells", "min"),
    "loss": Metric(
        "what training minimises, of the held-out cells; not comparable where its weights are searched", "min"
    ),
}
"""Name -> what it is: those that stand in metrics.jsonl as ``validation/NAME``."""

_ACCURACY: Mapping[str, Metric] = {
    "label_accuracy": Metric(
        "share of held-out cells with the right label, by the model's classifier, else by nearest neighbours", "max"
    ),
    "label_f1": Metric("macro F1 of the same labels: every label weighs alike, however rare", "max"),
}
_LABELS: Mapping[str, Metric] = {
    "silhouette_label": Metric("label conservation: silhouette width of the labels", "max"),
    "clisi": Metric("label conservation: neighbours of one label (cLISI)", "max"),
    "nmi": Metric("label conservation: k-means clusters and labels, mutual information", "max"),
    "ari": Metric("label conservation: k-means clusters and labels, adjusted Rand index", "max"),
    "label_score": Metric("label conservation: the mean of the four", "max"),
}
_BATCHES: Mapping[str, Metric] = {
    "silhouette_batch": Metric("batch mixing: silhouette width of the batches within labels", "max"),
    "ilisi": Metric("batch mixing: batches among the neighbours (iLISI)", "max"),
    "kbet": Metric("batch mixing: neighbourhoods with the batches of their label (kBET)", "max"),
}
_BOTH: Mapping[str, Metric] = {
    "graph_connectivity": Metric("batch mixing: cells of a label that hang together", "max"),
    "batch_score": Metric("batch mixing: the mean of its scores", "max"),
    "total": Metric("0.6 label_score + 0.4 batch_score (scIB)", "max"),
}
SCORES: Mapping[str, Metric] = {**_ACCURACY, **_LABELS, **_BATCHES, **_BOTH}
"""Name -> what it is: those that `validation_scores` computes."""

METRICS: Mapping[str, Metric] = {**LOSSES, **SCORES}
_NEED_LABELS = {*_ACCURACY, *_LABELS, "graph_connectivity", "total"}
_NEED_BATCHES = {*_BATCHES, "batch_score", "total"}


def check_metrics(names: Iterable[str], store: Store | None = None, held_out: float = SHARE) -> None:
    """That every name is known and, with `store`, can be computed on it with a share of `held_out` (data.validation).

    To be called before a search starts: each of its trials would fail for the same reason.

    Raises:
        UsageError: saying what is missing and what there is.
    """
    names = list(names)
    for name in names:
        if name not in METRICS:
            there = "; ".join(f"{known} ({metric.description})" for known, metric in METRICS.items())
            raise UsageError(f"metric '{name}': there is no such metric. There are: {there}")
    if store is None:
        return
    if names and not store.n_before(held_out):
        raise UsageError(
            f"metric '{names[0]}': is of held-out cells, and --data.validation is {held_out:g}; set it to 0.1"
        )
    scores = [name for name in names if name in SCORES]
    if scores:
        _check_codes(scores, scored_cells(store, store.schema, held_out), store)
    if _ACCURACY.keys() & set(scores):
        learnt_cells(store, store.schema, held_out)


def validation_scores(
    model: AtlasModel, store: Store, config: TrainConfig, names: Sequence[str], seed: int
) -> dict[str, float]:
    """The scores `names` of a model that is being trained on `store` as `config` says.

    Args:
        names: among `SCORES`. seed: of the k-means clusters.

    Raises:
        UsageError: a name that is not known, or a score that this store has not what it takes for.
        NonFiniteError: a latent that is not finite.
    """
    check_metrics(names)
    if wrong := [name for name in names if name not in SCORES]:
        raise UsageError(f"metric '{wrong[0]}': stands in metrics.jsonl and is not computed here")
    if not names:
        return {}
    held_out = config.data.validation
    cells = scored_cells(store, model.schema, held_out)
    _check_codes(names, cells, store)
    training = model.training
    model.eval()
    try:
        found = _accuracy(model, store, cells, held_out) if _ACCURACY.keys() & set(names) else {}
        if set(names) - _ACCURACY.keys():
            found |= integration(_latent(model, cells), cells.labels, cells.batches, max_cells=len(cells), seed=seed)
    finally:
        model.train(training)
    if undefined := [name for name in names if not np.isfinite(found.get(name, np.nan))]:
        raise UsageError(f"metric '{undefined[0]}': is not defined on the {len(cells):,} scored cells of {store.where}")
    return {name: found[name] for name in names}


def _accuracy(model: AtlasModel, store: Store, cells: FixedCells, held_out: float) -> dict[str, float]:
    """How well labels are predicted: by the model's classifier, or from neighbours among training cells."""
    assert cells.labels is not None
    if model.classifies:
        predicted = _classified(model, cells)
    else:
        predicted = _voted(_latent(model, cells), model, learnt_cells(store, model.schema, held_out))
    scores = label_accuracy(cells.labels, predicted)
    return {"label_accuracy": scores["accuracy"], "label_f1": scores["macro_f1"]}


def _check_codes(names: Sequence[str], cells: FixedCells, store: Store) -> None:
    """That the scored cells have the labels and batches that the scores are of."""
    for name in _NEED_LABELS.intersection(names):
        if cells.labels is None:
            raise UsageError(
                f"metric '{name}': needs labels, and {store.where} has none (ingest with --label-key); without there "
                f"are {', '.join([*LOSSES, *_BATCHES, 'batch_score'])}"
            )
        if len(np.unique(cells.labels)) < 2:
            only = store.schema.labels[0].name
            raise UsageError(f"metric '{name}': the scored cells of {store.where} have one value alone in '{only}'")
    for name in _NEED_BATCHES.intersection(names):
        if len(np.unique(cells.batches)) < 2:
            raise UsageError(
                f"metric '{name}': needs batches to mix, and the scored cells of {store.where} are of one alone; there "
                f"are {', '.join([*LOSSES, *_ACCURACY, 'label_score'])}"
            )


def _latent(model: AtlasModel, cells: FixedCells) -> np.ndarray:
    """Means of the latent (n, L)."""
    return np.concatenate([latent_of(model, batch)[0] for batch in cells.loader.epoch(0)])


@torch.no_grad()
def _classified(model: AtlasModel, cells: FixedCells) -> np.ndarray:
    """Codes of the likeliest classes (n,)."""
    parts = [model.predict_labels(batch.to(model.device)).argmax(-1).cpu() for batch in cells.loader.epoch(0)]
    codes: np.ndarray = torch.cat(parts).numpy()
    return codes


def _voted(latent: np.ndarray, model: AtlasModel, learnt: FixedCells) -> np.ndarray:
    """Codes (n,) that most of the nearest labelled training cells have."""
    assert learnt.labels is not None
    _, places = Neighbours(_latent(model, learnt)).of(latent, K)
    shares = votes(learnt.labels[places], np.ones(places.shape), int(learnt.labels.max()) + 1)
    codes: np.ndarray = shares.argmax(axis=1)
    return codes
