"""Differential expression between two sets of cells from draws of their decoded expression.

"vanilla": is gene g higher in set 1 (Lopez et al. 2018); "change": is the log fold change beyond delta
(Boyeau et al. 2019). The arithmetic and the columns are those of scvi-tools 1.4.2; cells are sampled before
they are decoded, so the cost does not grow with the sets. Shapes: S draws, G genes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from scarcade.engine.config import Section
from scarcade.engine.contracts import Batch
from scarcade.engine.errors import CategoryError, UsageError

EPS = 1e-8


class DifferentialConfig(Section):
    """How two sets of cells are compared."""

    mode: Literal["vanilla", "change"] = Field("vanilla", description="test of order, or of the size of the change")
    delta: float | None = Field(0.25, description="log2 fold change that counts (change); None: estimated")
    batch_correction: bool = Field(False, description="decode both sets in every batch, and compare batch by batch")
    batchid1: tuple[str, ...] | None = Field(None, description="batches to decode set 1 in (all)")
    batchid2: tuple[str, ...] | None = Field(None, description="batches to decode set 2 in (all)")
    fdr_target: float = Field(0.05, gt=0, lt=1, description="expected false discovery rate of the calls (change)")
    all_stats: bool = Field(True, description="add means and non-zero shares of the raw counts")
    n_samples_overall: int = Field(5000, ge=2, description="draws of each set")
    use_permutation: bool = Field(False, description="compare random pairs of draws")
    m_permutation: int = Field(10000, ge=1, description="number of those pairs")
    pseudocounts: float | None = Field(None, description="added to frequencies (change); None: estimated")
    threshold_counts: float = Field(0.01, ge=0, description="mean count below which a gene counts as not expressed")
    test_mode: Literal["two", "three"] = Field("three", description="up or down (two), or the larger of both (three)")


@dataclass(frozen=True)
class Groups:
    """Rows of two sets of cells, ascending, and the names that they go by."""

    rows1: np.ndarray
    rows2: np.ndarray
    name1: str | None = None
    name2: str | None = None


@dataclass(frozen=True)
class Draws:
    """Decoded frequencies of one set: one row a draw, with the batch that it was decoded in."""

    scales_SG: np.ndarray
    batch_S: np.ndarray  # object


@dataclass(frozen=True)
class RawStatistics:
    """Of the raw counts of both sets: each (2, G)."""

    mean: np.ndarray
    non_zero: np.ndarray
    normalised_mean: np.ndarray  # per 10,000 counts of the model's genes

    def table(self, index: pd.Index) -> pd.DataFrame:
        """The columns of scvi-tools."""
        named = {
            "raw_mean": self.mean,
            "non_zeros_proportion": self.non_zero,
            "raw_normalized_mean": self.normalised_mean,
        }
        return pd.DataFrame({f"{k}{i + 1}": v[i] for k, v in named.items() for i in range(2)}, index=index)


def groups_of(
    n_cells: int,
    column: Callable[[str], np.ndarray],
    *,
    groupby: str | None = None,
    group1: str | Sequence[str] | None = None,
    group2: str | None = None,
    idx1: np.ndarray | None = None,
    idx2: np.ndarray | None = None,
) -> list[Groups]:
    """The pairs of sets that are asked for.

    Raises:
        UsageError: neither a column nor rows. CategoryError: a value that no cell has, or an empty set.
    """
    if idx1 is not None:
        rows1 = _rows(idx1, n_cells)
        rows2 = np.setdiff1d(np.arange(n_cells), rows1) if idx2 is None else _rows(idx2, n_cells)
        if not len(rows1) or not len(rows2):
            raise CategoryError("idx1, idx2: one of the sets has no cells")
        return [Groups(rows1, rows2)]
    if groupby is None:
        raise UsageError("differential expression needs groupby (an obs column) or idx1 (rows)")
    values = column(groupby)
    present = sorted({str(value) for value in values if value is not None})
    wanted = present if group1 is None else [group1] if isinstance(group1, str) else list(group1)
    for value in [*wanted, *([group2] if group2 is not None else [])]:
        if value not in present:
            raise CategoryError(f"no cell has {value!r} in '{groupby}'; there are {', '.join(present)}")
    found = []
    for name in wanted:
        in1 = values == name
        in2 = ~in1 if group2 is None else values == group2
        if not in2.any():
            raise CategoryError(f"all cells have {name!r} in '{groupby}': there is nothing to compare with")
        found.append(Groups(np.flatnonzero(in1), np.flatnonzero(in2), name, "Rest" if group2 is None else group2))
    return found


def _rows(given: Any, n_cells: int) -> np.ndarray:
    chosen = np.asarray(given)
    if chosen.dtype == bool:
        if len(chosen) != n_cells:
            raise UsageError(f"a mask of {len(chosen)} cells for {n_cells}")
        return np.flatnonzero(chosen)
    if not np.issubdtype(chosen.dtype, np.integer) or (
        len(chosen) and not -n_cells <= chosen.min() <= chosen.max() < n_cells
    ):
        raise UsageError(f"idx1, idx2: wanted a mask, or rows below {n_cells}")
    return np.unique(chosen % n_cells)


def raw_statistics(batches: Iterable[Batch], n_genes: int, groups: Sequence[Groups]) -> list[RawStatistics]:
    """Means over the cells of each set of each pair, in one pass over all cells in their order.

    The rows of a set ascend, so those of a batch are found by bisection, without a mask of all cells for each set.
    """
    sets = [rows for pair in groups for rows in (pair.rows1, pair.rows2)]
    sums = np.zeros((3, len(sets), n_genes))
    start = 0
    for batch in batches:
        member = torch.zeros(len(sets), len(batch), dtype=torch.bool)
        for inside, rows in zip(member, sets, strict=True):
            first, last = np.searchsorted(rows, (start, start + len(batch)))
            inside[torch.from_numpy(rows[first:last] - start)] = True
        start += len(batch)
        if not member.any():
            continue
        x_BG = batch.counts.dense(torch.device("cpu")).double()
        total_B1 = x_BG.sum(1, keepdim=True)
        scaled_BG = x_BG * torch.where(total_B1 > 0, 1e4 / total_B1, 0.0)
        for i, values in enumerate((x_BG, (x_BG != 0).double(), scaled_BG)):
            sums[i] += (member.double() @ values).numpy()
    means = sums / np.array([[len(one)] for one in sets])
    return [RawStatistics(*means[:, i : i + 2]) for i in range(0, len(sets), 2)]


def compare(
    set1: Draws, set2: Draws, raw: RawStatistics, config: DifferentialConfig, rng: np.random.Generator
) -> pd.DataFrame:
    """One row a gene. Sets decoded in the same batches are paired within batches."""
    means = {"scale1": set1.scales_SG.mean(0), "scale2": set2.scales_SG.mean(0)}
    pairs = list(_pairs(set1, set2, config, rng))
    scales1, scales2 = np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])
    if config.mode == "vanilla":
        higher = (scales1 > scales2).mean(0)
        bayes = np.log(higher + EPS) - np.log(1 - higher + EPS)
        return pd.DataFrame({"proba_m1": higher, "proba_m2": 1 - higher, "bayes_factor": bayes, **means})

    pseudocount = config.pseudocounts
    if pseudocount is None:
        pseudocount = estimated_pseudocount(scales1, scales2, raw.mean < config.threshold_counts)
    change = np.log2(scales1 + pseudocount) - np.log2(scales2 + pseudocount)
    delta = estimated_delta(change.mean(0)) if config.delta is None else config.delta
    up, down = (change >= delta).mean(0), (change < -delta).mean(0)
    proba = up + down if config.test_mode == "two" else np.maximum(up, down)
    # summaries with a smaller pseudocount, which shrinks fold changes less
    change = np.log2(scales1 + 1e-3 * pseudocount) - np.log2(scales2 + 1e-3 * pseudocount)
    return pd.DataFrame(
        {
            "proba_de": proba,
            "proba_not_de": 1 - proba,
            "bayes_factor": np.log(proba + EPS) - np.log(1 - proba + EPS),
            **means,
            "pseudocounts": pseudocount,
            "delta": delta,
            "lfc_mean": change.mean(0),
            "lfc_median": np.median(change, 0),
            "lfc_std": change.std(0),
            "lfc_min": change.min(0),
            "lfc_max": change.max(0),
        }
    )


def _pairs(
    set1: Draws, set2: Draws, config: DifferentialConfig, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draws of both sets side by side."""
    parts = [(set1.scales_SG, set2.scales_SG)]
    if config.batch_correction and set(set1.batch_S) == set(set2.batch_S):
        parts = [
            (set1.scales_SG[set1.batch_S == value], set2.scales_SG[set2.batch_S == value])
            for value in dict.fromkeys(set1.batch_S)
        ]
    for a, b in parts:
        if config.use_permutation:
            n = max(1, config.m_permutation // len(parts))
            yield a[rng.integers(0, len(a), n)], b[rng.integers(0, len(b), n)]
        else:
            n = min(len(a), len(b))
            yield a[:n], b[:n]


def estimated_pseudocount(scales1: np.ndarray, scales2: np.ndarray, not_expressed: np.ndarray) -> float:
    """An offset that keeps genes that neither set expresses from having a fold change."""
    found = [
        float(np.quantile(scales.max(0)[absent], 0.9)) if absent.any() else 1e-10
        for scales, absent in zip((scales1, scales2), not_expressed, strict=True)
    ]
    return float(max(1e-10, max(found) / scales1.shape[1]))


def estimated_delta(mean_change: np.ndarray) -> float:
    """A threshold from a mixture of three normals over the genes' mean changes; at least 0.1."""
    from sklearn.mixture import GaussianMixture

    means = np.sort(GaussianMixture(3, random_state=0).fit(mean_change[:, None]).means_.ravel())
    return max(0.1, 0.6 * float(np.abs(means[[0, -1]]).mean()))


def fdr_calls(proba_de: np.ndarray, target: float) -> np.ndarray:
    """Which genes are called: the most probable ones, as many as keep the expected false discoveries at `target`."""
    order = np.argsort(-proba_de, kind="stable")
    expected = np.cumsum(1 - proba_de[order]) / np.arange(1, len(order) + 1)
    calls = np.zeros(len(order), bool)
    calls[order[: int((expected <= target).sum())]] = True
    return calls
