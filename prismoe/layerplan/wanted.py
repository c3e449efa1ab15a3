"""Neurons by importance: who wants which neuron, and who gets it (LLaMA-MoE 2406.16554, section 3.1).

`importance_CF` is how much each cluster of text wants each neuron; cluster c is expert c. Of equal scores the expert
with the higher number goes first (as in the published code), then the neuron with the lower number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.errors import NumericalError, UsageError
from prismoe.recipe import IntArray

__all__ = ["checked", "greedy", "most_wanted", "top"]

Scores = npt.NDArray[Any]


def checked(importance_CF: Scores, *, num_experts: int, layer: int) -> Scores:
    """The importances of `num_experts` data clusters: of more, those given first.

    Raises:
        UsageError: fewer clusters than experts.
        NumericalError: an importance that is not finite.
    """
    if len(importance_CF) < num_experts:
        raise UsageError(
            f"{len(importance_CF)} data clusters for {num_experts} experts",
            where="num_experts",
            needed="at least one data cluster for each expert",
            hint=f"calibrate with clusters={num_experts}",
        )
    if not np.isfinite(importance_CF).all():
        raise NumericalError("importance is not finite", where=f"layer {layer}", hint="calibrate again in fp32")
    return importance_CF[:num_experts]


def top(scores_F: Scores, count: int) -> IntArray:
    """The `count` neurons with the largest scores, ascending; of equal ones the first."""
    return np.sort(np.argsort(-scores_F.astype(np.float64), kind="stable")[:count]).astype(np.int32)


def greedy(importance_EF: Scores, neurons: IntArray, width: int) -> IntArray:
    """[E, width] disjoint: again and again the largest score of a neuron that is free for an expert that is not full.

    `neurons` (E · width of them) are those to give away; every one is given.
    """
    num_experts, count = len(importance_EF), len(neurons)
    assert count == num_experts * width
    scores = importance_EF[:, neurons].astype(np.float64)
    experts = np.repeat(np.arange(num_experts), count)
    places = np.tile(np.arange(count), num_experts)
    order = np.lexsort((places, -experts, -scores.ravel()))
    taken, held = np.full(count, -1), [0] * num_experts
    left = count
    for expert, place in zip(experts[order].tolist(), places[order].tolist(), strict=True):
        if taken[place] < 0 and held[expert] < width:
            taken[place] = expert
            held[expert] += 1
            left -= 1
            if not left:
                break
    return np.stack([np.sort(neurons[taken == expert]) for expert in range(num_experts)]).astype(np.int32)


def most_wanted(importance_EF: Scores, *, width: int, count: int) -> IntArray:
    """`count` neurons for the shared expert, ascending (Sharing-Inter).

    Each expert names its top `width` of the neurons that are left; those with the most names move, in index order, and
    the experts name again, until there are enough.
    """
    num_neurons = importance_EF.shape[1]
    ranked = np.argsort(-importance_EF.astype(np.float64), axis=1, kind="stable")
    free = np.ones(num_neurons, dtype=bool)
    moved = 0
    while moved < count:
        votes = np.zeros(num_neurons, np.int64)
        for order in ranked:
            votes[order[free[order]][:width]] += 1
        chosen = np.flatnonzero(votes == votes.max())[: count - moved]
        free[chosen] = False
        moved += len(chosen)
    return np.flatnonzero(~free).astype(np.int32)
