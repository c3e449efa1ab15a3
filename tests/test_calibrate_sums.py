"""Sums, marks, pairs and clusters by themselves, against the definition written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prismoe.calibrate.clusters import cluster_sequences, kmeans
from prismoe.calibrate.sums import activation_sums, count_pairs, importance_sums, largest
from prismoe.errors import InputError, NumericalError, UsageError


@settings(deadline=None)
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 12)), elements=st.sampled_from([0, 1, 2, 3])),
    st.data(),
)
def test_largest_takes_the_first_of_equal_values(values: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, values.shape[1]))
    found = largest(values, count)
    for row, columns in zip(values, found, strict=True):
        assert columns.tolist() == sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count])


@pytest.mark.parametrize("num_marks", [2, 9])  # touching pairs, and as a matrix product
def test_pairs_are_counted(num_marks: int) -> None:
    draw = np.random.default_rng(0)
    marks = np.sort(draw.permuted(np.tile(np.arange(40), (5000, 1)), axis=1)[:, :num_marks], axis=1)
    marked = np.zeros((5000, 40), np.int64)
    np.put_along_axis(marked, marks, 1, axis=1)
    counts = np.zeros((40, 40), np.int32)
    count_pairs(counts, marks[:1000])
    count_pairs(counts, marks[1000:])
    np.testing.assert_array_equal(counts, np.triu(marked.T @ marked))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "another"])
def test_sums_of_a_batch(monkeypatch: pytest.MonkeyPatch, threads: int, device: str) -> None:
    """What runs on a GPU is plain torch; here the same lines run on CPU tensors that do not say so."""
    import torch

    from prismoe.calibrate import sums

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(sums, "on_host", lambda tensor: device == "cpu")
    monkeypatch.setattr(sums, "PIECE", 64)  # several pieces a sequence
    draw = torch.Generator().manual_seed(0)
    h, g = (torch.randn(4, 50, 30, generator=draw) for _ in range(2))
    found, marks = activation_sums(h, num_marks=3)
    wide = h.double().numpy().reshape(-1, 30)
    for name, expected in {"mean": wide, "mean_abs": np.abs(wide), "mean_square": wide**2}.items():
        np.testing.assert_allclose(found[name], expected.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(marks.reshape(-1, 3), np.sort(np.argsort(-np.abs(wide), axis=1)[:, :3], axis=1))
    scores = (h.double() * g.double()).numpy()
    for kind, expected in {"l1": np.abs(scores), "square": scores**2, "total": scores, "total_square": scores}.items():
        sums_BF = importance_sums(h, g, kind=kind)  # type: ignore[arg-type]
        np.testing.assert_allclose(sums_BF, expected.sum(1), rtol=1e-5, atol=1e-5)


def blobs(num_clusters: int, *, size: int, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    centres = 20 * draw.normal(size=(num_clusters, width))
    truth = draw.permutation(np.repeat(np.arange(num_clusters), size))
    return centres[truth] + draw.normal(size=(len(truth), width)), truth


def test_kmeans_finds_clusters_that_are_there() -> None:
    points, truth = blobs(7, size=30)
    centroids, labels = kmeans(points, num_clusters=7, seed=0)
    pairs = {(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}
    assert len(pairs) == 7, "each true cluster is one found cluster"
    for c in range(7):
        np.testing.assert_allclose(centroids[c], points[labels == c].mean(axis=0))
    again = kmeans(points, num_clusters=7, seed=0)[1]
    np.testing.assert_array_equal(labels, again)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 5))
def test_kmeans_leaves_no_cluster_empty_and_no_point_astray(num_clusters: int, more: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(num_clusters + more, 3))
    centroids, labels = kmeans(points, num_clusters=num_clusters, seed=seed)
    assert set(labels.tolist()) == set(range(num_clusters))
    distances = ((points[:, None] - centroids) ** 2).sum(-1)
    own = distances[np.arange(len(points)), labels]
    np.testing.assert_allclose(own, distances.min(axis=1), atol=1e-9)


def test_a_channel_that_is_far_larger_does_not_decide_alone() -> None:
    points, truth = blobs(2, size=20, width=6)
    loud = np.random.default_rng(2).normal(size=(len(points), 1)) * 1e4
    labels = cluster_sequences(np.hstack([points, loud]).astype(np.float32), num_clusters=2, seed=0, standardise=True)
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 2


def test_rows_beyond_the_fitted_ones_are_labelled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from prismoe.calibrate import clusters

    points, truth = blobs(3, size=50)
    monkeypatch.setattr(clusters, "FIT_ROWS", 40)
    labels = cluster_sequences(points.astype(np.float32), num_clusters=3, seed=0, standardise=False)
    assert len(labels) == 150
    assert len({(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}) == 3


def test_what_cannot_be_clustered_is_refused() -> None:
    points = np.ones((5, 2), np.float32)
    with pytest.raises(UsageError, match="clusters: 5 sequences; needed 6 or more"):
        cluster_sequences(points, num_clusters=6, seed=0, standardise=True)
    with pytest.raises(InputError, match="clusters: 1 different sequences, so a cluster would be without tokens"):
        cluster_sequences(points, num_clusters=2, seed=0, standardise=False)
    points[1, 0] = np.nan
    with pytest.raises(NumericalError, match="clusters: a vector is not finite"):
        cluster_sequences(points, num_clusters=2, seed=0, standardise=False)
