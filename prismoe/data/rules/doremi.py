"""DoReMi's group DRO (arXiv 2305.10429, algorithm 1), with the weights driving what is sampled.

The paper clips the excess loss token by token, updates at every step and weighs the loss of a proxy model; here the
excess is a domain's held-out loss, clipped at 0, once an interval. What DoReMi recommends is the *average* of the
weights over the updates: `result` gives it, for the training run that follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from prismoe.data.weights import multiplied, smoothed

__all__ = ["result", "update"]


def update(
    weights: Mapping[str, float],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    *,
    eta: Annotated[float, Field(ge=0)] = 1.0,
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 1e-3,
) -> dict[str, float]:
    """Multiply each weight by exp(eta · max(0, loss - reference)); each then gets `smoothing` of an equal share."""
    gain = {name: eta * max(0.0, losses[name] - reference[name]) for name in weights}
    return smoothed(multiplied(weights, gain), share=smoothing)


def result(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of the weights after each update (at least one), the starting weights not among them."""
    return {name: math.fsum(weights[name] for weights in updates) / len(updates) for name in updates[0]}
