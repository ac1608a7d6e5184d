"""Labels of a reference's cells carried over to a query's cells, by weighted nearest neighbours in the latent space.

Needs the reference's latent and label codes (``latent.zarr`` beside a model), not its counts. Everything is done on
blocks of cells with arrays: no loop over cells, no (query x reference) matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from scarcade.engine.errors import CategoryError, NonFiniteError
from scarcade.engine.neighbours import Neighbours
from scarcade.engine.schema import UNLABELLED, Categories

Weights = Literal["gaussian", "distance"]
SAMPLE = 2_000, 10_000  # cells, at the least and at the most, by which a reference's own distances are measured
_PAIRS = 2_000_000_000  # of them and all others, at the most, before fewer are taken: a few seconds of searching


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

    @property
    def few(self) -> dict[str, int]:
        """Label columns with fewer labelled cells than `k`, and how many those are."""
        return {column.name: len(codes) for column, _, codes in self._labelled if len(codes) < self.k}

    def _own_distance(self, quantile: float = 0.95) -> float:
        """Distance (mean to k neighbours) that 95 % of the reference's own cells stay within."""
        n = len(self._all)
        if n < 2:
            return 1.0
        rng = np.random.default_rng([self.seed, 1])
        sample = min(max(_PAIRS // n, SAMPLE[0]), SAMPLE[1])
        among = np.sort(rng.choice(n, sample, replace=False)) if n > sample else np.arange(n)
        distances, _ = self._all.of_each_other(self.k, among)
        usual = float(np.quantile(distances.mean(axis=1), quantile))
        return usual if usual > 0 else 1.0  # a reference of twins: distances are told in the latent's own unit

    def predict(self, latent: np.ndarray) -> list[Prediction]:
        """Each label column for the cells `latent` (Q, L). Of classes with equal votes the first wins.

        Raises:
            NonFiniteError: a query cell has a latent that is not finite.
        """
        return self.of(latent, distance=False)[0]

    def distance(self, latent: np.ndarray) -> np.ndarray:
        """How far each cell lies from the reference, float32 (Q,): 1 is the edge of the reference.

        The mean distance to the k nearest reference cells (labelled or not), divided by the distance that 95 % of
        the reference's own cells stay within (the same mean, themselves left out, over a sample of them). So
        about one in twenty cells of a query like the reference lies above 1; where many do, the query holds what the
        reference does not.
        """
        return self.of(latent, labels=False)[1]

    def of(
        self, latent: np.ndarray, *, labels: bool = True, distance: bool = True
    ) -> tuple[list[Prediction], np.ndarray]:
        """`predict` and `distance` of the cells `latent` (Q, L) with one search for both, where they need the same.

        Neighbours are held for a block of cells at a time: 50 of a million cells would be 800 MB.
        """
        if not np.isfinite(latent).all():
            raise NonFiniteError("the latent of the query holds values that are not finite")
        n, columns = len(latent), self._labelled if labels else []
        predictions = [Prediction(column, np.empty(n, np.int64), np.empty(n, np.float32)) for column, _, _ in columns]
        far = np.empty(n if distance else 0, np.float32)
        wanted = {id(neighbours): neighbours for _, neighbours, _ in columns}
        if distance:
            wanted[id(self._all)] = self._all
        for start in range(0, n, self.block):
            part = slice(start, start + self.block)
            found = {key: neighbours.of(latent[part], self.k) for key, neighbours in wanted.items()}
            for prediction, (column, neighbours, codes) in zip(predictions, columns, strict=True):
                distances, places = found[id(neighbours)]
                shares = votes(codes[places], neighbour_weights(distances, self.weights), len(column))
                prediction.codes[part] = shares.argmax(axis=1)
                prediction.uncertainty[part] = np.clip(1 - shares.max(axis=1), 0, 1)
            if distance:
                far[part] = found[id(self._all)][0].mean(axis=1) / self.usual
        return predictions, far


def codes_of(values: Sequence[str | None], column: Categories) -> np.ndarray:
    """Codes of a query's own labels in the reference's order; -1 for a missing one, or one the reference lacks."""
    known: Mapping[str, int] = column.codes()
    return np.array([UNLABELLED if value is None else known.get(value, UNLABELLED) for value in values], np.int64)
