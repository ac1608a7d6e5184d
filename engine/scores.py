"""How well a latent space keeps labels apart and mixes batches, and how well labels were predicted.

Pure functions of (latent, labels, batches). Labels and batches are integer codes; -1 means "not known", and
such cells are never scored. What is quadratic in cells is computed on a sample whose size and seed are arguments.
All integration scores lie in [0, 1], 1 is best; definitions follow scIB (Luecken et al., Nature Methods 2022)
where they are named there, and differences are said. What scipy and scikit-learn compute is imported where it is
used: a mapping asks for the accuracy of labels alone, and their import is a second of its start.
"""

from collections.abc import Mapping

import numpy as np

from scarcade.engine.errors import InputError
from scarcade.engine.neighbours import Neighbours
from scarcade.engine.schema import UNLABELLED


def label_accuracy(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """``accuracy`` and ``macro_f1`` of predicted codes, over the cells whose truth is known.

    The macro F1 is the mean over the classes that occur in the truth or in the predictions, a class that is never
    predicted counts as 0 (as `sklearn.metrics.f1_score(average="macro")`).

    Raises:
        InputError: no cell has a known label.
    """
    known = truth >= 0
    truth, predicted = truth[known], predicted[known]
    if not len(truth):
        raise InputError("no cell has a known label: there is nothing to compare the predictions with")
    size = int(max(truth.max(), predicted.max())) + 2  # one more: a cell without a prediction (-1) is a miss
    confusion = np.bincount((truth + 1) * size + predicted + 1, minlength=size * size).reshape(size, size)[1:, :]
    hits = np.diagonal(confusion[:, 1:]).astype(float)
    occurs = confusion.sum(axis=1) + confusion[:, 1:].sum(axis=0)
    f1 = 2 * hits[occurs > 0] / occurs[occurs > 0]
    return {"accuracy": float(hits.sum() / len(truth)), "macro_f1": float(f1.mean())}


def silhouette_label(latent: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette width over cells, (s + 1) / 2: are cells nearer to their label than to the next? (scIB ASW)."""
    from sklearn.metrics import silhouette_samples

    return float((silhouette_samples(latent, labels).mean() + 1) / 2)


def silhouette_batch(latent: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """Within each label, 1 - |silhouette over batches|, meant over cells and then over labels (scIB batch ASW)."""
    from sklearn.metrics import silhouette_samples

    scores = []
    for label in np.unique(labels):
        of_label = labels == label
        groups = np.unique(batches[of_label])
        if 2 <= len(groups) < of_label.sum():
            scores.append(float(np.mean(1 - np.abs(silhouette_samples(latent[of_label], batches[of_label])))))
    return float(np.mean(scores)) if scores else float("nan")


def inverse_simpson(distances: np.ndarray, codes: np.ndarray, *, perplexity: float = 30.0) -> np.ndarray:
    """Local inverse Simpson index of each cell: how many categories its neighbourhood effectively holds.

    Korsunsky et al., Nature Methods 2019 (LISI): neighbours are weighed by exp(-beta d), beta such that the weights'
    entropy is log(perplexity); the index is 1 / sum_c p_c^2.

    Args:
        distances: (N, k) to the neighbours; k about three times the perplexity.
        codes: (N, k) categories of the neighbours, >= 0.
    """
    perplexity = min(perplexity, distances.shape[1] / 3)
    beta = np.ones(len(distances))
    low, high = np.zeros_like(beta), np.full_like(beta, np.inf)
    shifted = distances - distances[:, :1]  # the same weights after they are normalised, and no underflow
    for _ in range(60):
        weights = np.exp(-shifted * beta[:, None])
        total = weights.sum(axis=1)
        entropy = np.log(total) + beta * (shifted * weights).sum(axis=1) / total
        too_flat = entropy > np.log(perplexity)
        low, high = np.where(too_flat, beta, low), np.where(too_flat, high, beta)
        with np.errstate(invalid="ignore"):
            beta = np.where(np.isinf(high), beta * 2, (low + high) / 2)
        if np.all(np.abs(entropy - np.log(perplexity)) < 1e-5):
            break
    weights = np.exp(-shifted * np.minimum(beta, 1e300)[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    return np.asarray(1 / (_shares(codes, weights) ** 2).sum(axis=1))


def rejected_mixing(codes: np.ndarray, expected: np.ndarray, *, alpha: float = 0.05) -> float:
    """Share of neighbourhoods whose batches differ from the `expected` shares by a chi-square test (kBET).

    Büttner et al., Nature Methods 2019. Categories that are expected nowhere count as no degree of freedom.

    Args:
        codes: (N, k) batches of the neighbours. expected: (B,) shares, summing to 1.
    """
    from scipy.special import chdtrc

    k = codes.shape[1]
    observed = _shares(codes, np.ones(codes.shape), n_codes=len(expected))
    there = expected > 0
    statistic = ((observed[:, there] - k * expected[there]) ** 2 / (k * expected[there])).sum(axis=1)
    return float(np.mean(chdtrc(max(1, there.sum() - 1), statistic) < alpha))


def graph_connectivity(places: np.ndarray, labels: np.ndarray) -> float:
    """Mean over labels of the share of its cells in the largest connected part of the neighbour graph (scIB)."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    n, k = places.shape
    graph = csr_matrix((np.ones(n * k, np.int8), places.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    shares = []
    for label in np.unique(labels):
        of_label = np.flatnonzero(labels == label)
        _, part = connected_components(graph[of_label][:, of_label], directed=False)
        shares.append(np.bincount(part).max() / len(of_label))
    return float(np.mean(shares))


def clusters_agree(latent: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> dict[str, float]:
    """``nmi`` and ``ari`` of k-means clusters (as many as labels) with the labels.

    Not optimised over resolutions against the labels, as scIB's Louvain is: that flatters.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    clusters = KMeans(len(np.unique(labels)), n_init=3, random_state=seed).fit_predict(latent)
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(max(0.0, adjusted_rand_score(labels, clusters))),
    }


def integration(
    latent: np.ndarray,
    labels: np.ndarray | None,
    batches: np.ndarray | None,
    *,
    max_cells: int = 10_000,
    k: int = 90,
    seed: int = 0,
) -> dict[str, float]:
    """Every score that the given codes allow, and their means.

    Args:
        latent: (N, L).
        labels, batches: int (N,) codes, -1 where unknown; None leaves out the scores that need them.
        max_cells: the scores are those of a random sample of so many cells (silhouettes are quadratic in it).
        k: neighbours of a cell in the graph.

    Returns:
        Label scores ``silhouette_label, clisi, nmi, ari``, batch scores ``silhouette_batch, ilisi, kbet,
        graph_connectivity``, their means ``label_score`` and ``batch_score``, ``total`` = 0.6 label + 0.4 batch
        (scIB's weights), and ``n_cells`` that were scored. kBET and the batch silhouette are taken within labels.

    Raises:
        InputError: fewer than ten cells can be scored, or the latent is not finite.
    """
    known = np.ones(len(latent), bool)
    for codes in (labels, batches):
        if codes is not None:
            known &= codes != UNLABELLED
    rows = np.flatnonzero(known)
    if len(rows) < 10:
        raise InputError(f"only {len(rows)} cells have a label and a batch: at least 10 are needed for a score")
    if len(rows) > max_cells:
        rows = np.sort(np.random.default_rng([seed, 0]).choice(rows, max_cells, replace=False))
    latent = np.asarray(latent[rows], np.float32)
    if not np.isfinite(latent).all():
        raise InputError("the latent holds values that are not finite")
    labels = None if labels is None else np.unique(labels[rows], return_inverse=True)[1]
    batches = None if batches is None else np.unique(batches[rows], return_inverse=True)[1]
    distances, places = Neighbours(latent).of_each_other(min(k, len(rows) - 1))
    n_labels = 0 if labels is None else int(labels.max()) + 1
    n_batches = 0 if batches is None else int(batches.max()) + 1

    label_scores: dict[str, float] = {}
    if labels is not None and 2 <= n_labels < len(rows):
        clisi = float(np.median(inverse_simpson(distances, labels[places])))
        label_scores["silhouette_label"] = silhouette_label(latent, labels)
        label_scores["clisi"] = (n_labels - clisi) / (n_labels - 1)
        label_scores.update(clusters_agree(latent, labels, seed=seed))
    batch_scores: dict[str, float] = {}
    if batches is not None and 2 <= n_batches < len(rows):
        ilisi = float(np.median(inverse_simpson(distances, batches[places])))
        batch_scores["ilisi"] = (ilisi - 1) / (n_batches - 1)
        within = np.zeros(len(rows), np.int64) if labels is None else labels
        batch_scores["silhouette_batch"] = silhouette_batch(latent, within, batches)
        batch_scores["kbet"] = _kbet(latent, within, batches)
    if labels is not None:
        batch_scores["graph_connectivity"] = graph_connectivity(places[:, :15], labels)
    return {**label_scores, **batch_scores, **_means(label_scores, batch_scores), "n_cells": float(len(rows))}


def _kbet(latent: np.ndarray, labels: np.ndarray, batches: np.ndarray) -> float:
    """1 - rejection, within each label that has two batches, meant over labels; neighbourhoods of up to 50 cells."""
    accepted = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        expected = np.bincount(batches[rows], minlength=int(batches.max()) + 1) / len(rows)
        if len(rows) < 10 or (expected > 0).sum() < 2:
            continue
        _, places = Neighbours(latent[rows]).of_each_other(min(50, len(rows) // 4))
        accepted.append(1 - rejected_mixing(batches[rows][places], expected))
    return float(np.mean(accepted)) if accepted else float("nan")


def _means(label_scores: Mapping[str, float], batch_scores: Mapping[str, float]) -> dict[str, float]:
    means = {}
    for name, scores in (("label_score", label_scores), ("batch_score", batch_scores)):
        values = [value for value in scores.values() if np.isfinite(value)]
        if values:
            means[name] = float(np.mean(values))
    if len(means) == 2:
        means["total"] = 0.6 * means["label_score"] + 0.4 * means["batch_score"]
    return means


def _shares(codes: np.ndarray, weights: np.ndarray, n_codes: int | None = None) -> np.ndarray:
    """(N, C) sums of `weights` (N, k) by the codes (N, k) of the neighbours."""
    n_codes = int(codes.max()) + 1 if n_codes is None else n_codes
    flat = codes + np.arange(len(codes))[:, None] * n_codes
    return np.bincount(flat.ravel(), weights.ravel(), minlength=len(codes) * n_codes).reshape(len(codes), n_codes)
