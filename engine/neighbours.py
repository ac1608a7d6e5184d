"""Exact nearest neighbours in a latent space: the one search that scores and label transfer share.

Latents have 10 to 50 dimensions and clumps; there a brute force that forms distances in the processor's cache is as
fast as trees, needs no index, and is exact (see `nearest_kernel`). Memory is that of the results and one more copy of
the cells.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from scarcade.engine.errors import NonFiniteError, UsageError
from scarcade.engine.nearest_kernel import GROUP, nearest, strips_of


class Neighbours:
    """The cells among which neighbours are sought: `latent` (N, L), kept as float32 without a copy if it is.

    Raises:
        UsageError: no cells. NonFiniteError: values that are not finite.
    """

    def __init__(self, latent: np.ndarray) -> None:
        self.latent = np.ascontiguousarray(latent, dtype=np.float32)
        if self.latent.ndim != 2 or not len(self.latent):
            raise UsageError(f"neighbours are sought among cells x dimensions; given: {self.latent.shape}")
        _finite(self.latent)
        self._strips = strips_of(self.latent)

    def __len__(self) -> int:
        return len(self.latent)

    def of(self, query: np.ndarray, k: int, *, block: int = 16_384) -> tuple[np.ndarray, np.ndarray]:
        """Distances float64 (Q, k), ascending, and places int64 (Q, k) of the nearest cells; k is cut to N.

        Equal distances are told apart by their places, so the answer does not depend on threads. There are as many
        as torch computes with.
        """
        k = min(k, len(self))
        query = np.ascontiguousarray(query, dtype=np.float32)
        _finite(query)
        distances = np.empty((len(query), k))
        places = np.empty((len(query), k), np.int64)
        n_threads = torch.get_num_threads()
        step = min(block, max(GROUP, -(-len(query) // (4 * n_threads))))  # several pieces for each thread

        def search(start: int) -> None:
            here = slice(start, start + step)
            nearest(self._strips, self.latent, query[here], distances[here], places[here])

        starts = range(0, len(query), step)
        if n_threads == 1 or len(starts) < 2:
            for start in starts:
                search(start)
        else:
            with ThreadPoolExecutor(n_threads, thread_name_prefix="neighbours") as threads:
                list(threads.map(search, starts))
        return np.sqrt(distances, out=distances), places

    def of_each_other(self, k: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `of`, for these cells themselves (those at `among`, or all), without the cell itself; k is cut to N-1."""
        among = np.arange(len(self)) if among is None else np.asarray(among)
        distances, places = self.of(self.latent[among], k + 1)
        other = places != among[:, None]
        other[other.all(axis=1), -1] = False  # more than k twins: the cell itself was not listed, drop the last
        shape = (len(among), distances.shape[1] - 1)
        return distances[other].reshape(shape), places[other].reshape(shape)


def _finite(latent: np.ndarray) -> None:
    if not np.isfinite(latent).all():
        raise NonFiniteError("neighbours are sought among cells of which some have a latent that is not finite")
