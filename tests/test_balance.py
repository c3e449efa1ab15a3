"""Balanced k-means: against all partitions, plain balanced Lloyd, planted clusters, float64 sums, any thread count."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.balance import balanced_kmeans
from prismoe.balance.assignment import assign, equal_sizes
from prismoe.balance.products import thin_product
from prismoe.checkpoint import Checkpoint
from prismoe.errors import NumericalError, UsageError

Rows = npt.NDArray[np.float32]


def inertia(rows: npt.ArrayLike, labels: npt.NDArray[np.int32]) -> float:
    """Sum of squared distances to the cluster means, in float64, straight from the definition."""
    exact = np.asarray(rows, np.float64)
    parts = [exact[labels == j] for j in range(int(labels.max()) + 1)]
    return float(sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts))


def cosine_inertia(rows: npt.ArrayLike, labels: npt.NDArray[np.int32]) -> float:
    rows = np.asarray(rows, np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return len(rows) - float(sum(np.linalg.norm(rows[labels == j].sum(axis=0)) for j in range(labels.max() + 1)))


def lloyd(rows: Rows, centres: npt.NDArray[np.float64]) -> float:
    """Plain balanced Lloyd: exact assignment to the centres, centres to the means, until nothing falls any more."""
    exact, last = rows.astype(np.float64), np.inf
    while True:
        labels = assign((centres**2).sum(axis=1) - 2 * exact @ centres.T).labels
        centres = np.stack([exact[labels == j].mean(axis=0) for j in range(len(centres))])
        now = inertia(exact, labels)
        if now >= last - 1e-9 * last:
            return min(now, last)
        last = now


def unit_rows(seed: int, rows: int, columns: int, *, rank: int = 0) -> Rows:
    """Rows of length one: isotropic, or with a weak low-rank part as FFN rows have."""
    generator = np.random.default_rng(seed)
    data = generator.standard_normal((rows, columns))
    if rank:
        data += generator.standard_normal((rows, rank)) @ generator.standard_normal((rank, columns))
    return (data / np.linalg.norm(data, axis=1, keepdims=True)).astype(np.float32)


def test_restarts_find_the_best_of_all_partitions() -> None:
    for seed in range(5):
        rows = unit_rows(seed, 10, 3)
        best = min(inertia(rows, np.isin(np.arange(10), half).astype(np.int32)) for half in combinations(range(10), 5))
        found = balanced_kmeans(rows, 2, restarts=20)
        assert inertia(rows, found.labels) == pytest.approx(best, rel=1e-6)


def test_planted_clusters_are_found() -> None:
    generator = np.random.default_rng(3)
    truth = generator.permutation(np.repeat(np.arange(7), 60))
    rows = 10 * generator.standard_normal((7, 24))[truth] + generator.standard_normal((420, 24))
    labels = balanced_kmeans(rows, 7, restarts=3).labels
    assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 7


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 400),
    st.integers(1, 24),
    st.integers(1, 12),
    st.sampled_from(["l2", "cosine"]),
    st.sampled_from(["plain", "far off", "repeated", "equal"]),
    st.integers(0, 2**63 - 1),
)
def test_sizes_numbers_and_seed(count: int, columns: int, clusters: int, metric: str, kind: str, seed: int) -> None:
    clusters = min(clusters, count)
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((count, columns)).astype(np.float32)
    if kind == "far off":
        rows += 50
    elif kind == "repeated":
        rows = rows[generator.integers(0, 1 + count // 20, count)]
    elif kind == "equal":
        rows[:] = 0.5
    first = balanced_kmeans(rows, clusters, metric=metric, seed=seed)  # type: ignore[arg-type]
    again = balanced_kmeans(rows, clusters, metric=metric, seed=seed)  # type: ignore[arg-type]
    assert sorted(np.bincount(first.labels, minlength=clusters)) == sorted(equal_sizes(count, clusters))
    assert np.array_equal(first.labels, again.labels)
    assert first.centroids.tobytes() == again.centroids.tobytes()
    if metric == "l2":
        scale = float((rows.astype(np.float64) ** 2).sum())
        assert first.inertia == pytest.approx(inertia(rows, first.labels), abs=1e-6 * scale)
        means = np.stack([rows[first.labels == j].mean(axis=0, dtype=np.float64) for j in range(clusters)])
        np.testing.assert_allclose(first.centroids, means, atol=1e-5 * np.abs(rows).max())
    else:
        assert first.inertia == pytest.approx(cosine_inertia(rows, first.labels), abs=1e-5 * count)
        lengths = np.linalg.norm(first.centroids, axis=1)
        assert ((np.abs(lengths - 1) < 1e-5) | (lengths < 1e-5)).all()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_inertia_never_rises(metric: str) -> None:
    rows = unit_rows(5, 1500, 64, rank=6)
    measure = inertia if metric == "l2" else cosine_inertia
    path = [balanced_kmeans(rows, 6, metric=metric, rtol=0.0, max_epochs=n) for n in range(1, 14)]  # type: ignore[arg-type]
    values = [measure(rows, found.labels) for found in path]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(values))
    assert values[-1] < values[0] - 1e-3 * values[0]


@pytest.mark.parametrize(("rank", "all_below"), [(0, True), (32, True), (8, False)])
def test_below_plain_lloyd_and_nothing_left_for_it(rank: int, all_below: bool) -> None:
    """Wide rows, the same start: Lloyd locks in or settles higher, and cannot improve what we return.

    With 8 strong directions both land in one of many optima, and one start in ten favours Lloyd: there the mean counts.
    """
    ours, plain = [], []
    for seed in range(6):
        rows = unit_rows(seed, 1200, 256, rank=rank)
        start = rows[np.random.default_rng(seed).choice(len(rows), 8, replace=False)].astype(np.float64)
        found = balanced_kmeans(rows, 8, start=start, seed=seed)
        ours.append(found.inertia)
        plain.append(lloyd(rows, start))
        explained = inertia(rows, np.zeros(len(rows), np.int32)) - found.inertia
        assert lloyd(rows, found.centroids.astype(np.float64)) >= found.inertia - 1e-3 * explained
    assert np.mean(ours) < np.mean(plain)
    assert not all_below or np.less(ours, plain).all()


def test_real_rows_below_lloyd(shared: Path) -> None:
    checkpoint = Checkpoint.open(shared / "models" / "babyllama105")
    for layer in range(checkpoint.family.num_layers):
        rows = np.array(checkpoint.ffn(layer).up_FD, np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        start = rows[np.random.default_rng(layer).choice(len(rows), 8, replace=False)].astype(np.float64)
        found = balanced_kmeans(rows, 8, start=start)
        assert np.bincount(found.labels).tolist() == [len(rows) // 8] * 8
        assert inertia(rows, found.labels) <= lloyd(rows, start)


def test_cosine_ignores_lengths_and_l2_ignores_an_offset() -> None:
    rows = unit_rows(7, 600, 32, rank=4)
    lengths = 2.0 ** np.random.default_rng(0).integers(-3, 4, (600, 1))  # powers of two: the same digits
    plain, long = (balanced_kmeans(r, 5, metric="cosine") for r in (rows, rows * lengths))
    assert long.inertia == pytest.approx(plain.inertia, rel=1e-4)
    here, there = (balanced_kmeans(r, 5, seed=1) for r in (rows, rows + np.float32(4.0)))
    assert there.inertia == pytest.approx(here.inertia, rel=1e-3)


def test_a_better_restart_wins() -> None:
    rows = unit_rows(11, 600, 64, rank=6)
    assert balanced_kmeans(rows, 8, restarts=6).inertia < balanced_kmeans(rows, 8).inertia


THREADS = """
import hashlib, sys
import numpy as np
from prismoe.balance import balanced_kmeans
rows = np.random.default_rng(0).standard_normal((int(sys.argv[1]), int(sys.argv[2])), dtype=np.float32)
found = balanced_kmeans(rows, 8, metric=sys.argv[3], seed=5)
print(hashlib.sha256(found.labels.tobytes() + found.centroids.tobytes() + str(found.inertia).encode()).hexdigest())
"""


@pytest.mark.parametrize(("rows", "columns", "metric"), [(8000, 1024, "l2"), (900, 512, "cosine")])
def test_any_thread_count_gives_the_same_bytes(rows: int, columns: int, metric: str) -> None:
    """Eight million elements go through torch, half a million through NumPy alone."""
    seen = set()
    for threads in ("1", "5"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", THREADS, str(rows), str(columns), metric]
        seen.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(seen) == 1
    assert len(seen.pop().strip()) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize("size", [1, 1 << 23])
def test_thin_products_are_float32_and_leave_torch_as_it_was(size: int) -> None:
    import torch

    generator = np.random.default_rng(2)
    rows = generator.standard_normal((37, 3000), dtype=np.float32)
    centres = generator.standard_normal((5, 3000), dtype=np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with thin_product(size=size) as outer, thin_product(size=size) as product:
            assert torch.get_num_threads() == (2 if size == 1 else 1)
            found = product(rows, centres)
            assert np.array_equal(outer(rows, centres), found)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    exact = rows.astype(np.float64) @ centres.T.astype(np.float64)
    assert found.dtype == np.float32
    assert np.abs(found - exact).max() <= 2e-6 * np.abs(exact).max()


def test_read_only_rows_are_welcome() -> None:
    rows = unit_rows(1, 1100, 1024)
    rows.flags.writeable = False
    assert np.bincount(balanced_kmeans(rows, 4, max_epochs=2).labels).tolist() == [275] * 4


@pytest.mark.parametrize(
    ("rows", "clusters", "arguments", "error", "where"),
    [
        (np.zeros(4), 2, {}, UsageError, "num_clusters"),
        (np.zeros((3, 2)), 4, {}, UsageError, "num_clusters"),
        (np.zeros((3, 2)), 0, {}, UsageError, "num_clusters"),
        (np.ones((4, 2)), 2, {"metric": "l1"}, UsageError, "balanced_kmeans"),
        (np.ones((4, 2)), 2, {"restarts": 0}, UsageError, "balanced_kmeans"),
        (np.ones((4, 2)), 2, {"rtol": float("nan")}, UsageError, "balanced_kmeans"),
        (np.ones((4, 2)), 2, {"start": np.ones((2, 3))}, UsageError, "start"),
        (np.ones((4, 2)), 2, {"start": np.full((2, 2), np.inf)}, UsageError, "start"),
        (np.array([[1.0, 2.0], [np.nan, 0.0]]), 2, {}, NumericalError, "rows"),
        (np.array([[1.0, 2.0], [0.0, np.inf]]), 2, {"metric": "cosine"}, NumericalError, "rows"),
        (np.array([[1.0, 2.0], [0.0, 0.0]]), 2, {"metric": "cosine"}, NumericalError, "rows"),
        (np.full((4, 2), 1e25), 2, {}, NumericalError, "rows"),
        (np.arange(8).reshape(4, 2) * 1e-15, 2, {}, NumericalError, "rows"),
    ],
)
def test_what_does_not_fit_is_refused(
    rows: object, clusters: int, arguments: dict[str, object], error: type, where: str
) -> None:
    with pytest.raises(error) as caught:
        balanced_kmeans(rows, clusters, **arguments)  # type: ignore[arg-type]
    assert caught.value.where == where
    assert "\n" not in str(caught.value)
