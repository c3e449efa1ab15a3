"""Dynamic batch loading of Sheared-LLaMA (arXiv 2310.06694, section 2.2 and algorithm 1): more of what lags behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from prismoe.data.weights import multiplied, smoothed

__all__ = ["update"]


def update(
    weights: Mapping[str, float],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    *,
    form: Literal["released", "paper"] = "released",
    eta: Annotated[float, Field(ge=0)] = 1.0,
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 1e-4,
) -> dict[str, float]:
    """Multiply each weight by exp(eta · (loss - reference)) and make the sum 1 again.

    `form` "released" is what the authors' code does, and LLaMA-MoE's: a domain below its reference loses weight, and
    each domain then gets `smoothing` of an equal share. "paper" is the algorithm as printed: differences are clipped at
    0 and nothing is smoothed.
    """
    excess = {name: losses[name] - reference[name] for name in weights}
    if form == "paper":
        return multiplied(weights, {name: max(0.0, eta * value) for name, value in excess.items()})
    return smoothed(multiplied(weights, {name: eta * value for name, value in excess.items()}), share=smoothing)
