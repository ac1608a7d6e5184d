"""Which gene programs are higher in one group of cells than in another: Bayes factors on expiMap's latent.

Lotfollahi et al. 2023 (Methods, "differential gene program analysis"): pairs of cells, one of each group, are drawn
with replacement; P(H0) is the mean probability that the first cell's program is higher than the second's, both
independent normal variables; the Bayes factor is its log odds. A |Bayes factor| of 2.3 is odds of ten to one.

The latent of each cell is computed once, and pairs are drawn from it. (scArches encodes the cells of each group
again, and a group whose name is a part of the word "rest" is left out.) Shapes: P pairs, L programs.
"""

from dataclasses import dataclass

import numpy as np
import torch

EPS = 1e-12


@dataclass(frozen=True)
class Enrichment:
    """Of each program (L,): P(higher in the first group), 1 - that, and their log ratio."""

    p_h0: np.ndarray
    p_h1: np.ndarray
    bayes_factor: np.ndarray


def compare_groups(
    mean: np.ndarray,
    variance: np.ndarray,
    rows_0: np.ndarray,
    rows_1: np.ndarray,
    *,
    n_pairs: int = 5000,
    directions: np.ndarray | None = None,
    seed: int = 0,
) -> Enrichment:
    """Cells `rows_0` against cells `rows_1`, by `n_pairs` pairs drawn with replacement.

    Args:
        mean, variance: of the latent of all cells, (N, L).
        directions: (L,), 1 or -1 for each program: what a higher latent does to the expression of its genes. 0 for a
            program that explains nothing, whose three numbers are then 0.
    """
    rng = np.random.default_rng(seed)
    first, second = rng.choice(rows_0, n_pairs), rng.choice(rows_1, n_pairs)
    return of_pairs(mean[first], variance[first], mean[second], variance[second], directions)


def of_pairs(
    mean_0: np.ndarray,
    variance_0: np.ndarray,
    mean_1: np.ndarray,
    variance_1: np.ndarray,
    directions: np.ndarray | None = None,
) -> Enrichment:
    """The same of given pairs, each array (P, L). A program whose means are all 0 in a group has three zeros."""
    sign = np.ones(mean_0.shape[1]) if directions is None else np.asarray(directions, np.float64)
    apart = (mean_1.astype(np.float64) - mean_0) * sign
    spread = np.sqrt(2 * (variance_0.astype(np.float64) + variance_1))
    p_h0 = 0.5 * torch.special.erfc(torch.from_numpy(apart / spread)).numpy().mean(0)
    p_h1 = 1 - p_h0
    factor = np.log(p_h0 + EPS) - np.log(p_h1 + EPS)
    silent = (sign == 0) | ~mean_0.any(0) | ~mean_1.any(0)
    return Enrichment(*(np.where(silent, 0.0, value) for value in (p_h0, p_h1, factor)))
