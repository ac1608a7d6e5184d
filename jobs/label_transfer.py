"""Labels of a reference's cells carried over to a query's cells, by weighted nearest neighbours in the latent space.

Needs the reference's latent and label codes (``latent.zarr`` beside a model), not its counts. Everything is done on
blocks of cells with arrays: no loop over cells, no (query x reference) matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from scarcade.engine.contracts import UNLABELLED, Categories
from scarcade.engine.errors import CategoryError, NonFiniteError
from scarcade.engine.neighbours import Neighbours

Weights = Literal["gaussian", "distance"]


def neighbour_weights(distances: np.ndarray, how: Weights) -> np.ndarray:
    """Weights (Q, k), each row summing to 1, of neighbours at `distances` (Q, k).

    ``gaussian``: exp(-d / (2 / s)^2), s the standard deviation of the cell's own k distances; the rule of scArches
    (`weighted_knn_transfer`, Lotfollahi et al. 2022), which is close to a plain majority where s is small. The
    original divides by zero where all k distances are equal; there the weights are equal.
    ``distance``: 1 / d, and where neighbours lie at distance 0 they alone, alike; the rule of scikit-learn's
    ``KNeighborsClassifier(weights="distance")``.
    """
    if how == "gaussian":
        spread = distances.std(axis=1, keepdims=True)
        # Normalising takes a factor out again: measured from the nearest neighbour, the largest weight is 1.
        weights = np.exp(-(distances - distances[:, :1]) * spread**2 / 4)
    else:
        at_once = distances == 0
        with np.errstate(divide="ignore"):
            weights = np.where(at_once.any(axis=1, keepdims=True), at_once, 1 / distances)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def votes(codes: np.ndarray, weights: np.ndarray, n_classes: int) -> np.ndarray:
    """(Q, C) share of the weights (Q, k) that stands behind each class, by the neighbours' codes (Q, k)."""
    flat = codes.astype(np.int64) + np.arange(len(codes))[:, None] * n_classes
    return np.bincount(flat.ravel(), weights.ravel(), minlength=len(codes) * n_classes).reshape(-1, n_classes)


@dataclass(frozen=True)
class Prediction:
    """One label column of the query: ``values[codes]``, with the share of the vote that went elsewhere."""

    column: Categories
    codes: np.ndarray  # int (Q,)
    uncertainty: np.ndarray  # float32 (Q,) in [0, 1]; 0: all neighbours agree


@dataclass
class LabelTransfer:
    """The labelled cells of a reference, ready to be asked about any number of queries.

    Args:
        latent: (N, L) latent means of the reference's cells.
        columns: each label column with the codes (N,) of the reference's cells, -1 where a cell has no label: such a
            cell never votes, it is not even among the k neighbours of that column.
        k: neighbours that vote. weights: see `neighbour_weights`.
        seed: draws the cells by which the reference's own distances are measured.
        usual: what they were found to be, where that is known already (`_own_distance`).

    Raises:
        NonFiniteError: the reference's latent holds values that are not finite.
    """

    latent: np.ndarray
    columns: Sequence[tuple[Categories, np.ndarray]]
    k: int = 50
    weights: Weights = "gaussian"
    seed: int = 0
    block: int = 16_384
    skipped: tuple[str, ...] = ()  # columns in which no reference cell has a label
    usual: float = 0.0  # 0: to be found
    _all: Neighbours = field(init=False, repr=False)
    _labelled: list[tuple[Categories, Neighbours, np.ndarray]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not np.isfinite(self.latent).all():
            raise NonFiniteError("the reference's latent holds values that are not finite")
        self._all = Neighbours(self.latent)
        shared: dict[bytes, Neighbours] = {}
        self._labelled = []
        for column, codes in self.columns:
            if len(codes) != len(self.latent):
                raise CategoryError(f"{column.name}: {len(codes)} labels for {len(self.latent)} cells of the reference")
            known = codes != UNLABELLED
            if not known.any():
                self.skipped += (column.name,)
                continue
            key = np.packbits(known).tobytes()  # columns that label the same cells share one search
            if key not in shared:
                shared[key] = self._all if known.all() else Neighbours(self.latent[known])
            self._labelled.append((column, shared[key], np.asarray(codes[known], np.int64)))
        self.usual = self.usual or self._own_distance()

    def _own_distance(self, quantile: float = 0.95, sample: int = 10_000) -> float:
        """Distance (mean to k neighbours) that 95 % of the reference's own cells stay within."""
        if len(self._all) < 2:
            return 1.0
        rng = np.random.default_rng([self.seed, 1])
        n = len(self._all)
        among = np.sort(rng.choice(n, sample, replace=False)) if n > sample else np.arange(n)
        distances, _ = self._all.of_each_other(self.k, among)
        usual = float(np.quantile(distances.mean(axis=1), quantile))
        return usual if usual > 0 else 1.0  # a reference of twins: distances are told in the latent's own unit

    def predict(self, latent: np.ndarray) -> list[Prediction]:
        """Each label column for the cells `latent` (Q, L). Of classes with equal votes the first wins.

        Raises:
            NonFiniteError: a query cell has a latent that is not finite.
        """
        if not np.isfinite(latent).all():
            raise NonFiniteError("the latent of the query holds values that are not finite")
        searched: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        predictions = []
        for column, neighbours, codes in self._labelled:
            if id(neighbours) not in searched:
                searched[id(neighbours)] = neighbours.of(latent, self.k, block=self.block)
            distances, places = searched[id(neighbours)]
            predicted = np.empty(len(latent), np.int64)
            uncertainty = np.empty(len(latent), np.float32)
            for start in range(0, len(latent), self.block):
                part = slice(start, start + self.block)
                weights = neighbour_weights(distances[part], self.weights)
                shares = votes(codes[places[part]], weights, len(column))
                predicted[part] = shares.argmax(axis=1)
                uncertainty[part] = np.clip(1 - shares.max(axis=1), 0, 1)
            predictions.append(Prediction(column, predicted, uncertainty))
        return predictions

    def distance(self, latent: np.ndarray) -> np.ndarray:
        """How far each cell lies from the reference, float32 (Q,): 1 is the edge of the reference.

        The mean distance to the k nearest reference cells (labelled or not), divided by the distance that 95 % of
        the reference's own cells stay within (the same mean, themselves left out, over at most 10,000 of them). So
        about one in twenty cells of a query like the reference lies above 1; where many do, the query holds what the
        reference does not.
        """
        if not np.isfinite(latent).all():
            raise NonFiniteError("the latent of the query holds values that are not finite")
        distances, _ = self._all.of(latent, self.k, block=self.block)
        return np.asarray(distances.mean(axis=1) / self.usual, np.float32)


def codes_of(values: Sequence[str | None], column: Categories) -> np.ndarray:
    """Codes of a query's own labels in the reference's order; -1 for a missing one, or one the reference lacks."""
    known: Mapping[str, int] = column.codes()
    return np.array([UNLABELLED if value is None else known.get(value, UNLABELLED) for value in values], np.int64)
