"""How many experts each layer gives a token, chosen from what was measured with every number of them. NumPy alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["choose_top_k"]


def choose_top_k(
    errors_LE: npt.ArrayLike, *, budget: float | None = None, error: float | None = None, by_layer: bool
) -> tuple[int, ...]:
    """K of each layer, by one of two rules; `errors_LE[l, k - 1]` is the relative error of layer l with k experts on.

    `error`: the smallest K whose error is at most that; where no K reaches it, the K of the smallest error.
    `budget`: of all choices with mean(K) at most that, the one of the least Σ error²; of equal ones the one of the
    fewest experts. Errors need not fall with K, so it is found exactly (dynamic programming over layers and experts
    spent), not greedily.

    Without `by_layer` every layer has the same K: the smallest with which no layer is above `error` (or else that of
    the least worst layer), or the one of the least Σ error² that is at most `budget`.
    """
    errors = np.asarray(errors_LE, np.float64)
    layers, most = map(int, errors.shape)
    if error is not None:
        rows = errors if by_layer else errors.max(axis=0, keepdims=True)
        chosen = tuple(_first_below(row, error) for row in rows)
        return chosen if by_layer else chosen * layers
    assert budget is not None
    costs = errors**2
    if not by_layer:
        return (1 + int(np.argmin(costs.sum(axis=0)[: min(int(budget), most)])),) * layers
    return _spend(costs, int(budget * layers + 1e-9))


def _first_below(errors_E: npt.NDArray[np.float64], limit: float) -> int:
    reached = np.flatnonzero(errors_E <= limit)
    return 1 + int(reached[0] if len(reached) else np.argmin(errors_E))


def _spend(costs_LE: npt.NDArray[np.float64], total: int) -> tuple[int, ...]:
    """The K of each layer, Σ K ≤ `total`, of the least Σ cost; `total` is at least the number of layers."""
    layers, most = costs_LE.shape
    total = min(total, layers * most)
    best = np.full((layers + 1, total + 1), np.inf)  # [layers done, experts spent exactly] → the least cost
    best[0, 0] = 0.0
    taken = np.zeros((layers, total + 1), np.int64)
    for layer, costs_E in enumerate(costs_LE):
        for k in range(1, min(most, total) + 1):
            with_k = best[layer, : total + 1 - k] + costs_E[k - 1]
            better = with_k < best[layer + 1, k:]
            best[layer + 1, k:][better] = with_k[better]
            taken[layer, k:][better] = k
    spent = int(np.argmin(best[layers]))
    chosen: list[int] = []
    for layer in reversed(range(layers)):
        chosen.append(int(taken[layer, spent]))
        spent -= chosen[-1]
    return tuple(reversed(chosen))
