"""Two dimensions of a latent space to look at: principal components of the reference, or its UMAP.

A projection is made from the reference alone and then applied to queries, so that every query is shown in the same
frame. Principal components are exact and cost nothing, so they are the default. UMAP (the extra `umap`) shows
neighbourhoods; compiling it alone takes longer than mapping a small query (25 s on quiet cores, minutes on busy ones).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from scarcade.engine.errors import UsageError
from scarcade.engine.quiet import quiet

How = Literal["pca", "umap"]
SAMPLE = 4_000  # reference cells that a UMAP is made from, and that a picture shows


@dataclass(frozen=True)
class Projection:
    """A map from (n, L) to (n, 2), with the names of its axes and a sample of the reference in it."""

    axes: tuple[str, str]
    of: Callable[[np.ndarray], np.ndarray]
    sample: np.ndarray  # rows of the reference, int64 (m,)
    points: np.ndarray  # float32 (m, 2): where these rows lie

    @cached_property
    def frame(self) -> str:
        """Equal exactly where two projections show the same cell at the same place."""
        return hashlib.sha256(repr(self.axes).encode() + np.ascontiguousarray(self.points).tobytes()).hexdigest()[:16]


def project(latent: np.ndarray, how: How, *, seed: int = 0) -> Projection:
    """The projection of a reference's `latent` (N, L).

    Raises:
        UsageError: UMAP was asked for, and umap-learn is not installed.
    """
    n = len(latent)
    rng = np.random.default_rng([seed, 2])
    sample = np.sort(rng.choice(n, SAMPLE, replace=False)) if n > SAMPLE else np.arange(n)
    if how == "umap" and n > 15:
        of, points = _umap(latent[sample], seed)
        return Projection(("UMAP 1", "UMAP 2"), of, sample, points)
    of = _components(latent)
    return Projection(("PC 1", "PC 2"), of, sample, of(latent[sample]))


def _components(latent: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    centre = latent.mean(axis=0, dtype=np.float64) if len(latent) else np.zeros(latent.shape[1])
    centred = latent - centre
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])] < 0, -1, 1)  # a sign is arbitrary
    if axes.shape[1] < 2:
        axes = np.concatenate([axes, np.zeros((len(axes), 2 - axes.shape[1]))], axis=1)
    return lambda cells: np.asarray((cells - centre) @ axes, np.float32)


def _umap(latent: np.ndarray, seed: int) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    try:
        with quiet():
            import umap
    except ImportError as error:
        raise UsageError("--report.picture umap: needs umap-learn: pip install 'scarcade[umap]'") from error
    with quiet():
        fitted = umap.UMAP(random_state=seed, n_jobs=1).fit(latent)
    return _Umap(fitted), np.asarray(fitted.embedding_, np.float32)


@dataclass(frozen=True)
class _Umap:
    """A fitted UMAP as a function; Ray can carry it to its workers."""

    fitted: Any

    def __call__(self, cells: np.ndarray) -> np.ndarray:
        if not len(cells):
            return np.zeros((0, 2), np.float32)
        with quiet():  # one thread at a time: its compiled code has threads of its own
            return np.asarray(self.fitted.transform(cells), np.float32)
