"""Exact nearest neighbours in a latent space, in blocks: the one search that scores and label transfer share.

Latents have 10 to 50 dimensions and clumps; there a blocked brute force (a matrix product and a bounded heap,
scikit-learn's ArgKmin) is as fast as trees, needs no index, and is exact. Memory is that of the results.
"""

import numpy as np
from sklearn.neighbors import NearestNeighbors

from scarcade.engine.errors import UsageError


class Neighbours:
    """The cells among which neighbours are sought: `latent` (N, L), kept as float32 without a copy if it is."""

    def __init__(self, latent: np.ndarray) -> None:
        self.latent = np.ascontiguousarray(latent, dtype=np.float32)
        if self.latent.ndim != 2 or not len(self.latent):
            raise UsageError(f"neighbours are sought among cells x dimensions; given: {self.latent.shape}")
        self._index = NearestNeighbors(algorithm="brute", metric="euclidean").fit(self.latent)

    def __len__(self) -> int:
        return len(self.latent)

    def of(self, query: np.ndarray, k: int, *, block: int = 16_384) -> tuple[np.ndarray, np.ndarray]:
        """Distances float64 (Q, k), ascending, and places int64 (Q, k) of the nearest cells; k is cut to N.

        Equal distances are told apart by their places, so the answer does not depend on threads.
        """
        k = min(k, len(self))
        query = np.ascontiguousarray(query, dtype=np.float32)
        distances = np.empty((len(query), k))
        places = np.empty((len(query), k), np.int64)
        for start in range(0, len(query), block):
            _, found = self._index.kneighbors(query[start : start + block], n_neighbors=k)
            # The heap's distances come from a float32 product, (a-b)^2 = a^2 - 2ab + b^2, which loses what two near
            # cells differ in; those of the k that were found are taken again from the differences.
            exact = np.empty(found.shape)
            for column in range(k):
                differences = query[start : start + block].astype(np.float64) - self.latent[found[:, column]]
                exact[:, column] = np.sqrt(np.einsum("ij,ij->i", differences, differences))
            order = np.lexsort((found, exact), axis=1)
            distances[start : start + block] = np.take_along_axis(exact, order, axis=1)
            places[start : start + block] = np.take_along_axis(found, order, axis=1)
        return distances, places

    def of_each_other(self, k: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `of`, for these cells themselves (those at `among`, or all), without the cell itself; k is cut to N-1."""
        among = np.arange(len(self)) if among is None else np.asarray(among)
        distances, places = self.of(self.latent[among], k + 1)
        other = places != among[:, None]
        other[other.all(axis=1), -1] = False  # more than k twins: the cell itself was not listed, drop the last
        shape = (len(among), distances.shape[1] - 1)
        return distances[other].reshape(shape), places[other].reshape(shape)
