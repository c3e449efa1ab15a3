"""Data clusters: k-means over one vector per sequence (LLaMA-MoE, arXiv 2406.16554, clusters sentence embeddings).

Sizes are as they fall: unlike experts, data clusters need not be equal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError, NumericalError, UsageError

__all__ = ["cluster_sequences", "kmeans"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]
FIT_ROWS = 4096  # centroids settle long before; the other sequences are labelled by them
RESTARTS = 10


def cluster_sequences(
    vectors_ND: npt.NDArray[np.float32], *, num_clusters: int, seed: int, standardise: bool
) -> IntArray:
    """[N] labels of sequences by one vector each. Centroids are fitted on the first 4096 (their order is random).

    Mean hidden states have each channel standardised over the sequences: a few channels of a trained model are larger
    than all others together and would decide alone.

    Raises:
        UsageError: fewer sequences than clusters.
        InputError: the text does not fall into so many clusters: one would be without tokens.
        NumericalError: a vector is not finite.
    """
    fitted = np.asarray(vectors_ND[:FIT_ROWS], np.float64)
    if len(fitted) < num_clusters:
        raise UsageError(
            f"{len(fitted)} sequences", where="clusters", needed=f"{num_clusters} or more", hint="raise max_tokens"
        )
    if not np.isfinite(fitted).all():
        raise NumericalError("a vector is not finite", where="clusters", hint="the weights may be damaged")
    mean_D, std_D = fitted.mean(axis=0), fitted.std(axis=0)
    std_D[std_D == 0] = 1.0
    if not standardise:
        mean_D, std_D = np.zeros_like(mean_D), np.ones_like(std_D)
    fitted = (fitted - mean_D) / std_D
    centroids_CD, labels_N = kmeans(fitted, num_clusters=num_clusters, seed=seed)
    for start in range(FIT_ROWS, len(vectors_ND), FIT_ROWS):
        rows = (np.asarray(vectors_ND[start : start + FIT_ROWS], np.float64) - mean_D) / std_D
        labels_N = np.concatenate([labels_N, _distances(rows, centroids_CD).argmin(axis=1)])
    return labels_N.astype(np.int32)


def kmeans(points_ND: FloatArray, *, num_clusters: int, seed: int) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """([C, D] centroids, [N] labels) of the best of ten runs of Lloyd's algorithm from k-means++ starts.

    Raises:
        InputError: fewer different points than clusters.
    """
    if len(distinct := np.unique(points_ND, axis=0)) < num_clusters:
        raise InputError(
            f"{len(distinct)} different sequences, so a cluster would be without tokens",
            where="clusters",
            needed=f"{num_clusters} or more",
            hint="give more varied text, or ask for fewer clusters",
        )
    draw = np.random.Generator(np.random.Philox(key=[seed, num_clusters]))
    runs = [_lloyd(points_ND, _start(points_ND, num_clusters, draw)) for _ in range(RESTARTS)]
    _, centroids_CD, labels_N = min(runs, key=lambda run: run[0])
    return centroids_CD, labels_N


def _start(points_ND: FloatArray, num_clusters: int, draw: np.random.Generator) -> FloatArray:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centroid a point, likely in proportion to its distance²."""
    chosen = [int(draw.integers(len(points_ND)))]
    nearest_N = _distances(points_ND, points_ND[chosen])[:, 0]
    while len(chosen) < num_clusters:
        nearest_N[chosen] = 0.0
        chosen.append(int(draw.choice(len(points_ND), p=nearest_N / nearest_N.sum())))
        nearest_N = np.minimum(nearest_N, _distances(points_ND, points_ND[chosen[-1:]])[:, 0])
    return points_ND[chosen]


def _lloyd(points_ND: FloatArray, centroids_CD: FloatArray) -> tuple[float, FloatArray, npt.NDArray[np.int64]]:
    labels_N = np.full(len(points_ND), -1)
    for _ in range(300):
        distances_NC = _distances(points_ND, centroids_CD)
        before, labels_N = labels_N, distances_NC.argmin(axis=1)
        nearest_N = distances_NC[np.arange(len(points_ND)), labels_N]
        for empty in np.flatnonzero(np.bincount(labels_N, minlength=len(centroids_CD)) == 0):
            far = int(np.where(np.bincount(labels_N)[labels_N] > 1, nearest_N, -1.0).argmax())
            labels_N[far], nearest_N[far] = empty, 0.0
        if (labels_N == before).all():
            break
        member_CN = (labels_N == np.arange(len(centroids_CD))[:, None]).astype(np.float64)
        centroids_CD = member_CN @ points_ND / member_CN.sum(axis=1, keepdims=True)
    return float(nearest_N.sum()), centroids_CD, labels_N


def _distances(points_ND: FloatArray, centroids_CD: FloatArray) -> FloatArray:
    """[N, C] squared distances; never below 0, whatever rounding does to a difference of equal numbers."""
    squares = (points_ND**2).sum(axis=1)[:, None] - 2 * points_ND @ centroids_CD.T + (centroids_CD**2).sum(axis=1)
    return np.asarray(np.maximum(squares, 0.0))
