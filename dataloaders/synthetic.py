"""Made atlases of any size with a known truth: negative binomial counts with batches, labels and dropout.

The model, for cell n of batch b(n) and label l(n), gene g (`docs/simulate.md` explains each line):

    pi_b      ~ Dirichlet(composition * pi),  pi_l proportional to 1 / (1 + l)^0.5     labels differ by batch
    b(n)      ~ uniform,   l(n) ~ pi_b(n)
    L_n       = exp(N(log(library) + m_b - 0.35^2 / 2, 0.35^2)),   m_b ~ N(0, 0.2^2)   library size
    A_lg      = exp(s_g + d_lg),  s_g ~ N(0, 1.6^2),  d_lg ~ N(0, label_effect^2) for 15 % of genes, else 0
    B_bg      = exp(e_bg),  e_bg ~ N(0, batch_effect^2)
    a_np      ~ Gamma(2, c_lp),  c_lp is 1 for 40 % of (label, program), else 0.1      program activity
    r_ng      = A_lg B_bg prod_p (1 + a_np w_pg),  w_pg ~ Gamma(2, 0.5) for 5 % of genes, else 0
    mu_ng     = L_n r_ng / sum_g r_ng
    y_ng      ~ NegativeBinomial(mean mu_ng, inverse dispersion theta_g),  theta_g = exp(N(log 3, 0.5^2))
    x_ng      = y_ng, or 0 with probability dropout
    proteins  ~ NegativeBinomial(mean L'_n f_bp (1 + z_np F_p), 10),  z_np: 0.95 if the label expresses p, else 0.02

A negative binomial is drawn by inversion, and most draws are decided without a power: P(0) >= 1 - mu.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numba import njit

from scarcade.dataloaders.prefetch import Prefetch
from scarcade.dataloaders.store import CellBlock, Store, StoreWriter, open_store
from scarcade.engine.errors import UsageError
from scarcade.engine.published import published
from scarcade.engine.schema import Categories, Schema

_BLOCK, _BLOCK_ENTRIES = 8192, 1 << 24  # cells, and cells x genes, made at a time; part of what a seed means
_LARGEST = (1 << 16) - 1
_LIBRARY_SD, _GENE_SD, _THETA = 0.35, 1.6, 3.0


def simulate(
    out: str | Path,
    *,
    cells: int = 100_000,
    genes: int = 2_000,
    batches: int = 5,
    labels: int = 8,
    seed: int = 0,
    proteins: int = 0,
    programs: int = 0,
    library: float | None = None,
    dropout: float = 0.05,
    batch_effect: float = 0.4,
    label_effect: float = 1.0,
    composition: float = 20.0,
    unlabelled: float = 0.0,
    protein_batches: int | None = None,
    replace: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Store:
    """Write a made atlas with a known truth as a store, in memory independent of `cells`.

    obs gets `batch` (the batch key), `label` (the label key), `true_label`, `library` and `program_<p>`;
    ``store.truth()`` gives the parameters.

    Args:
        library: mean counts of a cell; the default, 12 sqrt(genes), makes 85 to 90 % zeros at 2,000 genes.
        dropout: probability that a count is lost.
        batch_effect, label_effect: standard deviations of the log fold changes.
        composition: how alike the batches are in their labels (large: alike).
        unlabelled: fraction of the cells whose `label` is missing (`true_label` is always there).
        protein_batches: the first so many batches have proteins measured; None: all of them.
        progress: called with the number of cells written so far.

    Raises:
        UsageError: a number out of its range. StorageError: `out` exists and `replace` is not set.
    """
    at_least = {"cells": (cells, 1), "genes": (genes, 2), "batches": (batches, 1), "labels": (labels, 1)}
    at_least |= {"seed": (seed, 0), "proteins": (proteins, 0), "programs": (programs, 0)}
    for name, (given, least) in at_least.items():
        if given < least:
            raise UsageError(f"--{name} {given}: it must be at least {least}")
    for name, fraction in (("dropout", dropout), ("unlabelled", unlabelled)):
        if not 0.0 <= fraction < 1.0:
            raise UsageError(f"--{name} {fraction}: a probability below 1 is wanted")
    library = 12.0 * genes**0.5 if library is None else library
    for name, positive in (("library", library), ("composition", composition)):
        if not positive > 0.0:
            raise UsageError(f"--{name} {positive}: it must be positive")
    for name, strength in (("batch-effect", batch_effect), ("label-effect", label_effect)):
        if not 0.0 <= strength <= 5.0:
            raise UsageError(f"--{name} {strength}: a standard deviation of log fold changes, 0 to 5")

    truth = _draw_truth(
        np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, 0)))),
        sizes=(genes, batches, labels, proteins, programs),
        library=library,
        effects=(batch_effect, label_effect, composition),
    )
    options = {"cells": cells, "library": library, "dropout": dropout, "unlabelled": unlabelled, "seed": seed}
    options |= {"batch_effect": batch_effect, "label_effect": label_effect, "composition": composition}
    schema = Schema(
        genes=_names("gene", genes),
        batch=Categories("batch", _names("batch", batches)),
        labels=(Categories("label", _names("label", labels)),),
        proteins=_names("protein", proteins),
    )
    maker = _Maker(truth, schema, cells, seed, dropout, unlabelled, protein_batches)
    with (
        published(out, replace=replace) as target,
        StoreWriter(
            target,
            schema=schema,
            var=pd.DataFrame(index=pd.Index(schema.genes, dtype=object)),
            index_dtype=np.uint16 if genes <= 1 << 16 else np.uint32,
            value_dtype=np.uint16,
            seed=seed,
            sources=[{"made": "scarcade simulate", **options}],
            truth={**truth, "options": json.dumps(options)},
            replace=replace,
        ) as writer,
    ):
        blocks = Prefetch(maker.blocks())  # made in a thread while the one before is compressed
        try:
            for block in blocks:
                writer.append(block)
                if progress is not None:
                    progress(writer.n_cells)
        finally:
            blocks.close()
    return open_store(out)


def write_h5ad(store: Store, path: str | Path, batches: Sequence[str]) -> None:
    """Some batches of `store` as an .h5ad file of their own (as queries, or as input to ingest)."""
    store.to_anndata(batches).write_h5ad(Path(path))


def _names(kind: str, n: int) -> tuple[str, ...]:
    """Names whose alphabetical order is that of their numbers."""
    width = len(str(max(0, n - 1)))
    return tuple(f"{kind}{i:0{width}d}" for i in range(n))


def _draw_truth(
    rng: np.random.Generator,
    *,
    sizes: tuple[int, int, int, int, int],
    library: float,
    effects: tuple[float, float, float],
) -> dict[str, np.ndarray]:
    """The parameters of the model (see the module's docstring)."""
    genes, batches, labels, proteins, programs = sizes
    batch_effect, label_effect, composition = effects
    fractions = 1.0 / np.sqrt(1.0 + np.arange(labels))
    fractions /= fractions.sum()
    marker = rng.random((labels, genes)) < 0.15
    in_program = rng.random((programs, genes)) < 0.05
    truth = {
        "label_fractions": rng.dirichlet(composition * fractions, batches),  # (batches, labels)
        "log_library": np.log(library) - _LIBRARY_SD**2 / 2 + 0.2 * rng.standard_normal(batches),
        "label_profile": np.exp(
            _GENE_SD * rng.standard_normal(genes) + label_effect * rng.standard_normal((labels, genes)) * marker
        ),
        "batch_factor": np.exp(batch_effect * rng.standard_normal((batches, genes))),
        "theta": np.clip(np.exp(np.log(_THETA) + 0.5 * rng.standard_normal(genes)), 0.3, 50.0),
        "program_loading": rng.gamma(2.0, 0.5, (programs, genes)) * in_program,
        "program_scale": np.where(rng.random((labels, programs)) < 0.4, 1.0, 0.1),
        "protein_background": np.exp(np.log(5.0) + 0.5 * rng.standard_normal((batches, proteins))),
        "protein_foreground": np.exp(np.log(20.0) + 0.5 * rng.standard_normal(proteins)),
        "protein_expressed": (rng.random((labels, proteins)) < 0.3).astype(np.float64),
    }
    return {name: value for name, value in truth.items() if value.size}


@dataclass(frozen=True)
class _Maker:
    """Makes the cells, block by block; block k is a function of (truth, seed, k)."""

    truth: dict[str, np.ndarray]
    schema: Schema
    cells: int
    seed: int
    dropout: float
    unlabelled: float
    protein_batches: int | None

    def blocks(self) -> Iterator[CellBlock]:
        size = max(64, min(_BLOCK, _BLOCK_ENTRIES // self.schema.n_genes))
        for number, start in enumerate(range(0, self.cells, size)):
            yield self._block(number, start, min(start + size, self.cells))

    def _block(self, number: int, start: int, stop: int) -> CellBlock:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, 1, number))))
        truth, n = self.truth, stop - start
        batch = rng.integers(0, len(self.schema.batch), n)
        cumulated = np.cumsum(truth["label_fractions"], axis=1)[batch]
        label = np.minimum((rng.random((n, 1)) >= cumulated).sum(axis=1), self.schema.n_labels - 1)
        library = np.exp(truth["log_library"][batch] + _LIBRARY_SD * rng.standard_normal(n))
        scale = truth.get("program_scale", np.zeros((self.schema.n_labels, 0)))[label]
        activity = rng.gamma(2.0, 1.0, scale.shape) * scale
        loading = truth.get("program_loading", np.zeros((0, self.schema.n_genes)))
        indptr, indices, data = _counts(
            truth["label_profile"],
            truth["batch_factor"],
            loading,
            truth["theta"],
            label,
            batch,
            activity,
            library,
            self.dropout,
            rng.integers(0, 1 << 63, n).astype(np.uint64),
        )
        shown = np.where(rng.random(n) < self.unlabelled, -1, label)
        width = len(str(self.cells - 1))
        labels = pd.Index(self.schema.labels[0].values)
        columns: dict[str, Any] = {
            "batch": pd.Categorical.from_codes(batch, categories=pd.Index(self.schema.batch.values)),
            "label": pd.Categorical.from_codes(shown, categories=labels),
            "true_label": pd.Categorical.from_codes(label, categories=labels),
            "library": library.astype(np.float32),
            **{f"program_{p}": activity[:, p].astype(np.float32) for p in range(activity.shape[1])},
        }
        names = pd.Index([f"cell{i:0{width}d}" for i in range(start, stop)], dtype=object)
        step = (1 << 64) // self.cells  # one key in each of `cells` equal stretches: sorted as they come
        keys = np.arange(start, stop, dtype=np.uint64) * np.uint64(step) + rng.integers(0, step, n, np.uint64)
        proteins, measured = self._proteins(rng, batch, label, library)
        return CellBlock(indptr, indices, data, keys, pd.DataFrame(columns, index=names), proteins, measured)

    def _proteins(
        self, rng: np.random.Generator, batch: np.ndarray, label: np.ndarray, library: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        if not self.schema.proteins:
            return None, None
        truth = self.truth
        expressed = np.where(truth["protein_expressed"][label] > 0, 0.95, 0.02)
        foreground = rng.random(expressed.shape) < expressed
        size = np.sqrt(library / np.exp(truth["log_library"][batch]))[:, None]
        mean = size * truth["protein_background"][batch] * (1.0 + foreground * truth["protein_foreground"])
        counts = np.minimum(rng.poisson(rng.gamma(10.0, mean / 10.0)), _LARGEST).astype(np.uint16)
        n_measured = len(self.schema.batch) if self.protein_batches is None else self.protein_batches
        measured = np.broadcast_to((batch < n_measured)[:, None], counts.shape)
        return np.where(measured, counts, 0).astype(np.uint16), np.ascontiguousarray(measured)


@njit(nogil=True, cache=True)
def _next(state: np.ndarray) -> float:
    """Uniform on [0, 1) by splitmix64."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(nogil=True, cache=True)
def _negative_binomial(u: float, mean: float, theta: float) -> int:
    """The quantile of NB(mean, theta) at u."""
    # Taylor's terms of P(0) = (1 + mean / theta)^-theta alternate: cut after a negative one they bound it from below
    a = (1.0 + 1.0 / theta) * mean * mean * 0.5
    if u < 1.0 - mean + a - a * (1.0 + 2.0 / theta) * mean * (1.0 / 3.0):
        return 0
    q = mean / (mean + theta)
    p = (theta / (mean + theta)) ** theta
    k = 0
    total = p
    while u >= total and k < _LARGEST:
        p *= q * (k + theta) / (k + 1.0)
        k += 1
        total += p
        if p < 1e-17 and k > mean:  # what is left of the tail is below the resolution of u
            break
    return k


@njit(nogil=True, cache=True)
def _counts(
    label_profile: np.ndarray,
    batch_factor: np.ndarray,
    loading: np.ndarray,
    theta: np.ndarray,
    label: np.ndarray,
    batch: np.ndarray,
    activity: np.ndarray,
    library: np.ndarray,
    dropout: float,
    seeds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR counts of the cells; each cell has a stream of random numbers of its own."""
    n, genes = len(label), len(theta)
    indptr = np.zeros(n + 1, np.int64)
    indices = np.empty(n * genes, np.uint32)  # only what is written to is ever resident
    data = np.empty(n * genes, np.uint16)
    rate = np.empty(genes)
    state = np.empty(1, np.uint64)
    at = 0
    for i in range(n):
        state[0] = seeds[i]
        total = 0.0
        for g in range(genes):
            rate[g] = label_profile[label[i], g] * batch_factor[batch[i], g]
        for p in range(len(loading)):
            for g in range(genes):
                rate[g] *= 1.0 + activity[i, p] * loading[p, g]
        for g in range(genes):
            total += rate[g]
        scale = library[i] / total
        for g in range(genes):
            mean = scale * rate[g]
            u = _next(state)
            if u < 1.0 - mean:
                continue
            count = _negative_binomial(u, mean, theta[g])
            if count > 0 and (dropout == 0.0 or _next(state) >= dropout):
                indices[at] = g
                data[at] = count
                at += 1
        indptr[i + 1] = at
    return indptr, indices[:at].copy(), data[:at].copy()
