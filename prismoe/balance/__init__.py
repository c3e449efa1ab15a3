"""Balanced k-means: clusters of exactly equal size, by leave-one-out (Hartigan) updates of whole blocks of rows.

Lloyd's iteration stalls on wide rows: each row pulls its own centroid towards itself and stays (arXiv 2602.09936).
Here a row is priced without its own pull. A block of rows is re-assigned at once, exactly and with the sizes kept
(`assignment`), the cluster sums follow the rows that moved, and a block is kept only if the objective really fell, so
inertia never rises. Between sweeps over all rows, sweeps over the rows nearest to a boundary do most of the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prismoe.balance.assignment import Floats, Ints, assign, equal_sizes, solve
from prismoe.balance.products import Product, Rows, thin_product
from prismoe.errors import NumericalError, UsageError

__all__ = ["Clusters", "balanced_kmeans"]

_BLOCKS = 2  # of a sweep; each re-assigns its share of the rows against the same sums
_CHUNKS = 8  # of a block: contiguous rows, drawn anew for each sweep so that any two rows meet
_ACTIVE = 4  # one row in so many is near enough to a boundary for the sweeps in between
_INNER = 8
_HALVINGS = 3
_SEEDING_ROWS = 2048


@dataclass(frozen=True, eq=False)
class Clusters:
    """`labels` [N] int32; `centroids` [K, D] float32 (of unit length for cosine); `inertia`: the sum over rows of the
    squared distance to the centroid (l2) or of 1 − cosine; `epochs`: sweeps over all rows; `passes`: rows visited / N,
    the sweeps near boundaries included.
    """

    labels: npt.NDArray[np.int32]
    centroids: Rows
    inertia: float
    epochs: int
    passes: float


def balanced_kmeans(
    rows: npt.ArrayLike,
    num_clusters: int,
    *,
    metric: Literal["l2", "cosine"] = "l2",
    seed: int = 0,
    start: npt.ArrayLike | None = None,
    rtol: float = 1e-4,
    restarts: int = 1,
    max_epochs: int = 300,
) -> Clusters:
    """Cluster `rows` [N, D] into `num_clusters` clusters whose sizes differ by at most one.

    `start` [K, D] are first centroids (default: k-means++ on at most 2048 rows, one draw per restart; the restart of
    least inertia wins). It ends when a sweep over all rows lowers the inertia by less than `rtol` of what the
    clustering explains. The rows are used as they are: LLaMA-MoE (2406.16554, 3.1) clusters L2-normalised ones; cosine
    normalises by itself. One thread, the same result under a seed whatever the thread count; memory beside float32
    rows: a quarter of them.

    Raises:
        UsageError: arguments that do not fit together.
        NumericalError: a row that is not finite, or of length zero under cosine.
    """
    data = np.require(rows, np.float32, ["C", "W"])
    if data.ndim != 2 or not 1 <= num_clusters <= len(data):
        raise UsageError(
            f"rows of shape {data.shape} do not make {num_clusters} clusters",
            where="num_clusters",
            needed="[rows, columns] and between 1 and as many clusters as rows",
        )
    if metric not in ("l2", "cosine") or restarts < 1 or max_epochs < 1 or not rtol >= 0:
        raise UsageError(
            f"metric={metric!r}, restarts={restarts}, max_epochs={max_epochs}, rtol={rtol}",
            where="balanced_kmeans",
            needed="l2 or cosine, at least one restart and one epoch, a tolerance of 0 or more",
        )
    first = None if start is None else np.asarray(start, np.float64)
    if first is not None and (first.shape != (num_clusters, data.shape[1]) or not np.isfinite(first).all()):
        raise UsageError(
            f"start has shape {first.shape}", where="start", needed=f"[{num_clusters}, {data.shape[1]}], finite"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is reported as an error of ours
        if metric == "cosine":
            data = _unit(data)
        mean, squares = _moments(data, centred=metric == "l2")
    best: Clusters | None = None
    with thin_product(size=data.size) as product:
        for restart in range(restarts):
            generator = np.random.Generator(np.random.Philox(key=[seed, restart]))
            centres = _seeding(data, num_clusters, generator, product) if first is None or restart else first
            found = _Descent(data, mean, squares, centres, metric, generator, product).run(rtol, max_epochs)
            if best is None or found.inertia < best.inertia:
                best = found
    assert best is not None
    return best


class _Descent:
    """One descent. `objective` is total − inertia: Σ‖S‖²/n over centred cluster sums S (l2), or Σ‖S‖ (cosine)."""

    def __init__(
        self,
        data: Rows,
        mean: Floats,
        squares: Floats,
        centres: Floats,
        metric: str,
        generator: np.random.Generator,
        product: Product,
    ) -> None:
        self.data, self.mean, self.squares, self.product, self.generator = data, mean, squares, product, generator
        self.spherical = metric == "cosine"
        num_clusters = len(centres)
        centred = centres - mean
        # Squared distances less each row's own square, which is the same for every cluster.
        offset = (centred**2).sum(axis=1) + 2.0 * np.vecdot(centred, mean)
        away = product(data, centred.astype(np.float32)) * -2.0 + offset
        self.sizes = equal_sizes(len(data), num_clusters)
        # The clusters most wanted get the larger sizes.
        wanted = np.bincount(away.argmin(axis=1), minlength=num_clusters)
        self.sizes[np.argsort(-wanted, kind="stable")] = self.sizes.copy()
        self.labels = assign(away, self.sizes).labels
        self.slack = np.zeros(len(data))
        self.prices: Floats | None = None
        self.visited = 0
        self.gathered = np.empty((256, data.shape[1]), np.float32)
        self.sums = -self.sizes[:, None] * mean
        self.sums = self._moved(data, np.arange(len(data)), self.labels, None)
        self.objective = self._objective(self.sums)

    def run(self, rtol: float, max_epochs: int) -> Clusters:
        near = len(self.data) // _ACTIVE
        packed = np.empty((near, self.data.shape[1]), np.float32)
        epochs = 0
        while epochs < max_epochs:
            epochs += 1
            gain = self._sweep(self.data, self.labels, self.squares, self.slack)
            if gain <= rtol * self.objective:
                break
            if near < 16 * len(self.sizes):
                continue
            rows = np.sort(np.argpartition(self.slack, near)[:near])
            np.take(self.data, rows, axis=0, out=packed, mode="clip")
            labels, squares = self.labels[rows], self.squares[rows]
            first = 0.0
            for _ in range(_INNER):
                gain = self._sweep(packed, labels, squares, None)
                first = first or gain
                if gain <= max(0.3 * first, rtol * self.objective / _ACTIVE):
                    break
            self.labels[rows] = labels
        length = np.sqrt((self.sums**2).sum(axis=1, keepdims=True))
        centroids = (
            self.sums / np.maximum(length, 1e-300) if self.spherical else self.sums / self.sizes[:, None] + self.mean
        )
        return Clusters(
            self.labels.astype(np.int32),
            centroids.astype(np.float32),
            max(0.0, float(self.squares.sum()) - self.objective),
            epochs,
            self.visited / len(self.data),
        )

    def _sweep(self, data: Rows, labels: Ints, squares: Floats, slack: Floats | None) -> float:
        """Re-assign every row once, block by block; returns by how much the objective grew."""
        before = self.objective
        self.visited += len(data)
        blocks = min(_BLOCKS, max(1, len(data) // (16 * len(self.sizes))))
        edges = np.linspace(0, len(data), blocks * _CHUNKS + 1).astype(int)
        for chunks in self.generator.permutation(blocks * _CHUNKS).reshape(blocks, _CHUNKS):
            parts = [np.arange(edges[c], edges[c + 1]) for c in np.sort(chunks)]
            sums = self.sums.astype(np.float32)
            products = np.concatenate([self.product(data[edges[c] : edges[c + 1]], sums) for c in np.sort(chunks)])
            self._exchange(data, labels, squares, slack, np.concatenate(parts), products, halvings=_HALVINGS)
        return self.objective - before

    def _exchange(
        self,
        data: Rows,
        labels: Ints,
        squares: Floats,
        slack: Floats | None,
        rows: Ints,
        products: Rows,
        *,
        halvings: int,
    ) -> None:
        """Re-assign `rows` among their own clusters; keep it if the objective grows, else try each half alone."""
        own = labels[rows]
        counts = np.bincount(own, minlength=len(self.sizes))
        found = solve(self._costs(products, own, squares[rows]), counts, self.prices)
        if counts.all():
            self.prices = found.prices
        if slack is not None:
            slack[rows] = found.slack
        moved = np.flatnonzero(found.labels != own)
        if not len(moved):
            return
        sums = self._moved(data, rows[moved], found.labels[moved], own[moved])
        objective = self._objective(sums)
        if objective > self.objective:
            self.sums, self.objective = sums, objective
            labels[rows[moved]] = found.labels[moved]
        elif halvings and len(rows) > 2:
            for half in (slice(None, None, 2), slice(1, None, 2)):
                self._exchange(data, labels, squares, slack, rows[half], products[half], halvings=halvings - 1)

    def _moved(self, data: Rows, rows: Ints, into: Ints, out_of: Ints | None) -> Floats:
        """The cluster sums after `rows` went. No BLAS, so no thread count shows in the digits."""
        sums = self.sums.copy()
        order = np.argsort(into, kind="stable")
        for at in range(0, len(rows), len(self.gathered)):
            part = order[at : at + len(self.gathered)]
            gathered = np.take(data, rows[part], axis=0, out=self.gathered[: len(part)], mode="clip")
            ends = np.cumsum(np.bincount(into[part], minlength=len(sums)))
            for j in np.flatnonzero(np.diff(ends, prepend=0)):
                sums[j] += gathered[ends[j - 1] if j else 0 : ends[j]].sum(axis=0)
            if out_of is not None:
                for j in np.unique(out_of[part]):
                    sums[j] -= gathered[out_of[part] == j].sum(axis=0)
        return sums

    def _costs(self, products: Rows, own: Ints, squares: Floats) -> Floats:
        """[K, n]: what the objective loses when the row is in cluster j and not in none; without its own pull."""
        dots = np.ascontiguousarray(products.T, np.float64)
        at = own, np.arange(len(own))
        norms = (self.sums**2).sum(axis=1)[:, None]
        if self.spherical:
            costs: Floats = np.sqrt(norms) - np.sqrt(np.maximum(norms + 2.0 * dots + squares, 0.0))
            left = norms[own, 0]
            costs[at] = np.sqrt(np.maximum(left - 2.0 * dots[at] + squares, 0.0)) - np.sqrt(left)
            return costs
        dots -= np.vecdot(self.sums, self.mean)[:, None]
        dots *= -2.0
        dots -= squares
        dots[at] += 2.0 * squares
        dots /= self.sizes[:, None]
        return dots

    def _objective(self, sums: Floats) -> float:
        squares = (sums**2).sum(axis=1)
        return float(np.sqrt(squares).sum() if self.spherical else (squares / self.sizes).sum())


def _unit(data: Rows) -> Rows:
    lengths = np.sqrt(np.einsum("nd,nd->n", data, data))
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        row = int(np.argmin(np.isfinite(lengths) & (lengths > 0)))
        raise NumericalError(f"row {row} has no direction (length {lengths[row]})", where="rows")
    unit: Rows = data / lengths[:, None]
    return unit


def _moments(data: Rows, *, centred: bool) -> tuple[Floats, Floats]:
    """The mean row (zeros when not centred) and each row's squared distance to it."""
    blocks = [slice(at, at + 512) for at in range(0, len(data), 512)]
    mean = np.zeros(data.shape[1])
    if centred:
        for block in blocks:
            mean += data[block].sum(axis=0)
        mean /= len(data)
    shift = mean.astype(np.float32)
    lengths, squares = np.empty(len(data)), np.empty(len(data))
    for block in blocks:
        lengths[block] = np.einsum("nd,nd->n", data[block], data[block])
        if centred:
            part = data[block] - shift
            squares[block] = np.einsum("nd,nd->n", part, part)
    lengths[~np.isfinite(lengths)] = np.inf
    if (longest := float(lengths.max())) > 1e24 or 0 < longest < 1e-20:
        raise NumericalError(
            f"row {int(lengths.argmax())} has squared length {longest:.3g}",
            where="rows",
            needed="finite rows that float32 can square; scale them",
        )
    return mean, squares if centred else lengths


def _seeding(data: Rows, num_clusters: int, generator: np.random.Generator, product: Product) -> Floats:
    """k-means++ (Arthur & Vassilvitskii 2007) on a sample of the rows."""
    few = max(_SEEDING_ROWS, 16 * num_clusters)
    sample = data if len(data) <= few else data[np.sort(generator.choice(len(data), few, replace=False))]
    chosen = [int(generator.integers(len(sample)))]
    lengths = np.einsum("nd,nd->n", sample, sample).astype(np.float64)
    nearest = np.full(len(sample), np.inf)
    while len(chosen) < num_clusters:
        last = chosen[-1]
        nearest = np.minimum(nearest, lengths - 2.0 * product(sample, sample[last : last + 1])[:, 0] + lengths[last])
        nearest[chosen] = 0.0
        weights = np.maximum(nearest, 0.0)
        if not weights.any():
            weights = np.ones(len(sample))
            weights[chosen] = 0.0
        chosen.append(int(generator.choice(len(sample), p=weights / weights.sum())))
    return sample[chosen].astype(np.float64)
