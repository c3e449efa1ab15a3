"""Exact assignment of rows to clusters of given sizes, at the least total cost.

This is a transportation problem with K sinks, and K is small. A price per cluster turns it into "every row takes
its cheapest cluster"; the right prices make the counts come out. They are found by Newton steps on the dual,
smoothed by a softmin whose width follows the rows that still have to move. What is left, a handful of rows, goes along
shortest augmenting paths on the graph of the K clusters (Ahuja, Magnanti & Orlin, Network Flows, section 9.7). The
result is accepted only when its prices prove it: no row finds a cheaper cluster (linear programming duality).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prismoe.errors import NumericalError, UsageError

__all__ = ["Assignment", "assign", "equal_sizes"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SAMPLE = 2048  # rows above which the first prices come from every eighth row
_DUST = 1e-13  # relative to the largest cost: below it a difference is rounding


@dataclass(frozen=True, eq=False)
class Assignment:
    """`labels` [N] int64. `prices` [K]: row i's cheapest cluster under cost + price is its own (the proof, and a warm
    start for a similar problem). `slack` [N] ≥ 0: how much dearer its next best cluster is.
    """

    labels: Ints
    prices: Floats
    slack: Floats


def equal_sizes(num_rows: int, num_clusters: int) -> Ints:
    """[K] sizes that sum to `num_rows` and differ by at most one, the larger ones first."""
    base, extra = divmod(num_rows, num_clusters)
    return base + (np.arange(num_clusters) < extra).astype(np.int64)


def assign(
    costs: npt.ArrayLike, sizes: npt.ArrayLike | None = None, *, prices: npt.ArrayLike | None = None
) -> Assignment:
    """Give row i of `costs` [N, K] one cluster so that cluster j gets exactly `sizes[j]` rows, at the least total cost.

    The optimum is exact up to float64 rounding (1e-12 of the largest cost per row). `sizes` default to
    `equal_sizes(N, K)`. `prices` [K] of an earlier, similar problem save time and never change the total.
    Deterministic; one thread; memory about five times that of `costs` in float64.

    Raises:
        UsageError: shapes or sizes that do not fit.
        NumericalError: a cost that is not finite.
    """
    costs = np.asarray(costs)
    if costs.ndim != 2 or not costs.size:
        raise UsageError(f"costs have shape {costs.shape}", where="costs", needed="[rows, clusters], not empty")
    num_rows, num_clusters = costs.shape
    wanted = equal_sizes(num_rows, num_clusters) if sizes is None else np.asarray(sizes)
    if wanted.shape != (num_clusters,) or wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.sum() != num_rows:
        raise UsageError(
            f"sizes {wanted.tolist()[:8]} do not fit {num_rows} rows and {num_clusters} clusters",
            where="sizes",
            needed="one non-negative integer per cluster, summing to the number of rows",
        )
    start = None if prices is None else np.asarray(prices, np.float64)
    if start is not None and (start.shape != (num_clusters,) or not np.isfinite(start).all()):
        raise UsageError(f"prices have shape {start.shape}", where="prices", needed=f"{num_clusters} finite numbers")
    costs_KN = np.ascontiguousarray(costs.T, np.float64)
    if not np.isfinite(costs_KN).all():
        raise NumericalError("a cost is not finite", where="costs", hint="look for NaN or Inf in the rows")
    # A power of two brings the costs to [0, 1] without touching their digits.
    exponent = int(np.frexp(max(float(costs_KN.max()), -float(costs_KN.min())))[1]) + 1
    costs_KN = np.ldexp(costs_KN, -exponent)
    costs_KN -= costs_KN.min(axis=0)
    found = solve(costs_KN, wanted.astype(np.int64), None if start is None else np.ldexp(start, -exponent))
    return Assignment(found.labels, np.ldexp(found.prices, exponent), np.ldexp(found.slack, exponent))


def solve(costs_KN: Floats, sizes: Ints, prices: Floats | None) -> Assignment:
    """`assign` on checked, transposed costs: the form the clustering loop already has them in."""
    used = np.flatnonzero(sizes)
    if len(used) < len(sizes):
        part = solve(costs_KN[used], sizes[used], None if prices is None else prices[used])
        # An unused cluster is priced so that nobody wants it.
        closed = part.prices.max() + 2 * (np.ptp(costs_KN) + np.ptp(part.prices)) + 1e-9
        everywhere = np.full(len(sizes), closed)
        everywhere[used] = part.prices
        return Assignment(used[part.labels], everywhere, part.slack)
    if len(sizes) == 1:
        rows = costs_KN.shape[1]
        return Assignment(np.zeros(rows, np.int64), np.zeros(1), np.full(rows, np.inf))
    # The right prices are never further apart than the costs of one row: a bad start is cut to that.
    span = float((costs_KN.max(axis=0) - costs_KN.min(axis=0)).max())
    start = _first_prices(costs_KN, sizes) if prices is None else np.clip(prices - _middle(prices), -span, span)
    return _solve(costs_KN, sizes, start, _DUST * span)


def _first_prices(costs_KN: Floats, sizes: Ints) -> Floats:
    rows = costs_KN.shape[1]
    if rows <= _SAMPLE:
        return np.zeros(len(sizes))
    sample = np.ascontiguousarray(costs_KN[:, ::8])
    # Largest remainder, so that the sample's sizes sum to the sample.
    share = sizes * (sample.shape[1] / rows)
    small = share.astype(np.int64)
    small[np.argsort(small - share, kind="stable")[: sample.shape[1] - small.sum()]] += 1
    return solve(sample, small, None).prices


def _solve(costs_KN: Floats, sizes: Ints, prices: Floats, dust: float) -> Assignment:
    """Newton steps while many rows are misplaced, then only the rows near a boundary, then paths for the last few."""
    num_clusters, rows = costs_KN.shape
    few, near_floor = max(2, num_clusters // 4), 64 + 4 * num_clusters
    best, stalled, widen = rows + 1, 0, 16
    while True:
        priced, labels, slack, excess = _look(costs_KN, sizes, prices)
        surplus = int(np.abs(excess).sum()) // 2
        if surplus == 0:
            return Assignment(labels, prices, slack)
        stalled = 0 if surplus < best else stalled + 1
        best = min(best, surplus)
        count = near_floor + widen * surplus
        if 2 * count < rows:
            # The others keep their cluster, unless the prices that come back say otherwise.
            near = np.flatnonzero(slack <= np.partition(slack, count)[count])
            kept = np.bincount(labels, minlength=num_clusters) - np.bincount(labels[near], minlength=num_clusters)
            widen *= 4
            if (kept <= sizes).all():
                part = _solve(costs_KN[:, near], sizes - kept, prices, dust)
                labels[near], prices = part.labels, part.prices
                slack = _slack(costs_KN + prices[:, None], labels)
                if slack.min() >= -dust:
                    return Assignment(labels, prices, slack)
            continue
        width = float(np.partition(slack, min(rows - 1, 2 * surplus))[min(rows - 1, 2 * surplus)])
        if surplus <= few or stalled == 3 or width <= dust:
            break
        prices = prices + _newton_step(priced, labels, slack, excess, sizes, width)
    prices = _augment(costs_KN, labels, excess, prices, dust)
    return Assignment(labels, prices, _slack(costs_KN + prices[:, None], labels))


def _look(costs_KN: Floats, sizes: Ints, prices: Floats) -> tuple[Floats, Ints, Floats, Ints]:
    """Costs + prices less each row's least; labels when every row takes its cheapest; slack; counts minus sizes."""
    priced = costs_KN + prices[:, None]
    labels = priced.argmin(axis=0)
    priced -= priced.min(axis=0)
    slack = _slack(priced, labels)
    priced[labels, np.arange(len(labels))] = 0.0
    return priced, labels, slack, np.bincount(labels, minlength=len(sizes)) - sizes


def _slack(priced: Floats, labels: Ints) -> Floats:
    """How much dearer the best other cluster is than the row's own, which is overwritten in `priced`."""
    rows = np.arange(priced.shape[1])
    own = priced[labels, rows]
    priced[labels, rows] = np.inf
    slack: Floats = priced.min(axis=0) - own
    return slack


def _newton_step(priced: Floats, labels: Ints, slack: Floats, excess: Ints, sizes: Ints, width: float) -> Floats:
    """A Newton step on the dual, the minimum softened over `width` (twice the misplaced rows lie within it).

    A step never goes further than what alone would bring that cluster's count right, or twice the width.
    """
    share = np.exp(priced * (-1.0 / width))
    share /= share.sum(axis=0)
    counts = share.sum(axis=1)
    curvature = share @ share.T
    np.negative(curvature, out=curvature)
    # The ridge removes the one direction (all prices alike) that changes nothing.
    curvature[np.diag_indices_from(curvature)] += counts + 1e-3 * sizes + 1e-9
    step = width * np.linalg.solve(curvature, counts - sizes)
    step -= _middle(step)
    limit = np.full(len(sizes), 2.0 * width)
    for j in np.flatnonzero((np.abs(step) > limit) & (excess != 0)):
        margins = slack[labels == j] if excess[j] > 0 else priced[j, labels != j]
        rank = abs(int(excess[j])) - 1
        limit[j] = max(limit[j], float(np.partition(margins, rank)[rank]))
    return np.clip(step, -limit, limit)


def _middle(values: Floats) -> float:
    return float(np.sort(values)[len(values) // 2])


def _augment(costs_KN: Floats, labels: Ints, excess: Ints, prices: Floats, dust: float) -> Floats:
    """Move rows along shortest paths from crowded to short clusters, in place; returns prices that prove the result.

    Edge a → b weighs what the cheapest row of a would pay to move to b. `labels` must be optimal for their own counts,
    which every path keeps true. Equal rows move together, so ties cost one path and not one each.
    """
    num_clusters = len(excess)
    columns = np.arange(num_clusters)
    while True:
        order = labels.astype(np.int16 if num_clusters < 2**15 else np.int64).argsort(
            kind="stable"
        )  # 16 bits go by radix
        ends = np.cumsum(np.bincount(labels, minlength=num_clusters))
        starts = np.concatenate([[0], ends[:-1]])
        extra = costs_KN[:, order]
        extra -= extra[labels[order], np.arange(len(order))]
        held = np.flatnonzero(ends > starts)
        weights = np.full((num_clusters, num_clusters), np.inf)
        weights[held] = np.minimum.reduceat(extra, starts[held], axis=1).T
        weights[columns, columns] = np.inf
        if not excess.any():
            return -_distances(weights, -prices, dust)[0]
        distance, parent = _distances(weights, np.where(excess > 0, 0.0, np.inf), dust)
        end = at = int(np.where(excess < 0, distance, np.inf).argmin())
        amount, moves = int(-excess[end]), []
        while parent[at] >= 0:
            a = int(parent[at])
            tied = starts[a] + np.flatnonzero(extra[at, starts[a] : ends[a]] <= weights[a, at])
            moves.append((order[tied], at))
            amount = min(amount, len(tied))
            at = a
        amount = min(amount, int(excess[at]))
        for rows, to in moves:
            labels[rows[:amount]] = to
        excess[at] -= amount
        excess[end] += amount


def _distances(weights: Floats, start: Floats, dust: float) -> tuple[Floats, Ints]:
    """Bellman-Ford from all nodes at once: shortest distances and the node each was reached from (-1: its start)."""
    distance, parent = start.copy(), np.full(len(start), -1)
    for _ in range(len(start)):
        through = distance[:, None] + weights
        source = through.argmin(axis=0)
        shorter = through[source, np.arange(len(start))]
        better = shorter < distance - dust
        if not better.any():
            break
        distance[better], parent[better] = shorter[better], source[better]
    return distance, parent
