"""Reference cells whose label their neighbours contradict: they would pass a wrong label on to a whole query.

Wilson's edited nearest neighbours (1972, IEEE Trans SMC 2:408), with a rule that spares rare types. In a FACS-sorted
reference a tenth of a gate may be cells of another type; a query of that type from another laboratory lands on just
those cells, so at k = 15 a quarter of it got the gate's label.

Shapes: N labelled cells, J of them on the jury, L latent dimensions, C classes.
"""

from pathlib import Path

import numpy as np

from scarcade.dataloaders.store import Store
from scarcade.engine.errors import UsageError
from scarcade.engine.neighbours import Neighbours
from scarcade.engine.schema import UNLABELLED, Shard
from scarcade.jobs.label_transfer import votes
from scarcade.jobs.latent import LATENT, LatentReader, read_latent

_LEAST = 5  # neighbours that are asked at least
ALL = Shard()


def check_latent(model: str | Path, store: Store) -> Path:
    """The latent that `model` has of the cells of the store; none of its cells is read.

    Raises:
        UsageError: the folder has no latent of just this store. OpenError, CorruptError: it cannot be read.
    """
    folder = Path(model) / LATENT
    latent = LatentReader(folder) if folder.is_dir() else None
    # that of an updated model names the new store, and has the cells of the reference before its own
    own = latent is not None and latent.about.get("data") == store.fingerprint and "before" not in latent.about
    if latent is None or not own or latent.n_cells != store.n_cells:
        raise UsageError(
            f"--data.edit-labels: the model in --init-from {model} has no latent of the cells of {store.where}, and of "
            "those alone; train it on the same store"
        )
    return folder


def contradicted_in(model: str | Path, store: Store, *, seed: int = 0, shard: Shard = ALL) -> np.ndarray:
    """bool (n cells of the store): `contradicted` for the primary label, in the latent that `model` has of them.

    Raises:
        UsageError, OpenError, CorruptError: as `check_latent`.
    """
    latent = read_latent(check_latent(model, store))
    codes = np.array(store.codes(store.schema.labels[0].name), np.int64)
    known = np.flatnonzero(codes != UNLABELLED)
    found = np.zeros(len(codes), bool)
    found[known] = contradicted(latent.mean[known], codes[known], seed=seed, shard=shard)
    return found


def contradicted(
    latent: np.ndarray,
    codes: np.ndarray,
    *,
    k: int = 50,
    jury: int = 50_000,
    seed: int = 0,
    block: int = 16_384,
    shard: Shard = ALL,
) -> np.ndarray:
    """bool (N,): cells with one other label behind more than half of their nearest neighbours.

    A cell of a class with n cells is judged by its k nearest, or n / 2 if those are fewer: else a type of 20 cells
    would always be outvoted. The cost is N x `jury`: of more cells than that, so many are drawn to judge all.

    Args:
        latent: (N, L). codes: (N,) from 0, all of them labelled.
        shard: judges every ``shard.size``-th block alone, the others stay False: workers share the search, and the sum
            of what they find is the same for any number of them.
    """
    n = len(codes)
    found = np.zeros(n, bool)
    judges = np.arange(n)
    if n > jury:
        judges = np.sort(np.random.default_rng([seed, 2]).choice(n, jury, replace=False))
    classes = int(codes.max(initial=0)) + 1
    of_class = np.bincount(codes[judges], minlength=classes)
    k = min(k, len(judges) - 1)
    if k < 1 or np.count_nonzero(of_class) < 2:
        return found
    asked = np.clip(of_class[codes] // 2, min(_LEAST, k), k)
    neighbours = Neighbours(latent[judges])
    for start in range(shard.rank * block, n, shard.size * block):
        cells = np.arange(start, min(start + block, n))
        places = judges[neighbours.of(latent[cells], k + 1)[1]]
        itself = places == cells[:, None]
        others = np.take_along_axis(places, np.argsort(itself, axis=1, kind="stable"), axis=1)[:, :k]
        weights = (np.arange(k) < asked[cells][:, None]) / asked[cells][:, None]
        shares = votes(codes[others], weights, classes)
        shares[np.arange(len(cells)), codes[cells]] = 0
        found[cells] = shares.max(axis=1) > 0.5
    return found
