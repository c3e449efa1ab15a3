"""Domain weights: fractions of tokens, given as a table or by the name of a published one.

llama1: Touvron et al. 2023, table 1, over SlimPajama's seven domains; also LLaMA-MoE's first setting.
sheared-llama: the weights at which Sheared-LLaMA's dynamic batch loading ended for 1.3B and 2.7B;
LLaMA-MoE (arXiv 2406.16554, section 4.2) trained its released models with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prismoe.errors import UsageError

if TYPE_CHECKING:
    from prismoe.data.shards import Domain

__all__ = ["PRESETS", "check_weights", "multiplied", "resolve_weights", "smoothed"]

PRESETS: dict[str, dict[str, float]] = {
    "llama1": {
        "arxiv": 0.025,
        "books": 0.045,
        "c4": 0.15,
        "commoncrawl": 0.67,
        "github": 0.045,
        "stackexchange": 0.02,
        "wikipedia": 0.045,
    },
    "sheared-llama": {
        "arxiv": 0.007,
        "books": 0.091,
        "c4": 0.492,
        "commoncrawl": 0.361,
        "github": 0.008,
        "stackexchange": 0.010,
        "wikipedia": 0.031,
    },
}


def resolve_weights(weights: Mapping[str, float] | str, domains: Sequence[Domain]) -> dict[str, float]:
    """Weights of exactly `domains`, in their order, summing to 1.

    Raises:
        UsageError: an unknown name, a domain in one place only, a number that is no fraction, a sum that is not 1.
    """
    if isinstance(weights, str):
        weights = _named_weights(weights, domains)
    return _checked(weights, [domain.name for domain in domains])


def check_weights(weights: Mapping[str, float] | str, names: Sequence[str]) -> None:
    """What `resolve_weights` refuses, told before any domain called one of `names` is prepared.

    Raises:
        UsageError: as there.
    """
    if weights not in ("proportional", "uniform"):
        _checked(_preset(weights) if isinstance(weights, str) else weights, names)


def _checked(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    if set(weights) != set(names):
        only_weights, only_domains = sorted(set(weights) - set(names)), sorted(set(names) - set(weights))
        found = [f"weights for {', '.join(only_weights)}, which are not domains"] if only_weights else []
        found += [f"no weight for {', '.join(only_domains)}"] if only_domains else []
        raise UsageError(
            "; ".join(found), where="weights", needed="one weight per domain", hint="0 leaves a domain out of training"
        )
    checked = {name: float(weights[name]) for name in names}
    for name, weight in checked.items():
        if not 0 <= weight < math.inf:
            raise UsageError(f"{weight}", where=f"weights.{name}", needed="a fraction from 0 to 1")
    total = math.fsum(checked.values())
    if abs(total - 1) > 1e-6:
        raise UsageError(f"weights that sum to {total:.6g}", where="weights", needed="1")
    return checked


def multiplied(weights: Mapping[str, float], gain: Mapping[str, float]) -> dict[str, float]:
    """`weights` · exp(`gain`), summing to 1, however large a gain is. A domain of weight 0 stays out."""
    kept = {name: math.log(weight) + gain[name] for name, weight in weights.items() if weight > 0}
    largest = max(kept.values())
    raw = {name: math.exp(kept[name] - largest) if name in kept else 0.0 for name in weights}
    total = math.fsum(raw.values())
    return {name: value / total for name, value in raw.items()}


def smoothed(weights: Mapping[str, float], *, share: float) -> dict[str, float]:
    """(1 - share) · `weights` + share / n for each of the n domains whose weight is not 0."""
    count = sum(weight > 0 for weight in weights.values())
    return {name: (1 - share) * weight + share / count if weight > 0 else 0.0 for name, weight in weights.items()}


def _named_weights(name: str, domains: Sequence[Domain]) -> Mapping[str, float]:
    if name == "uniform":
        return {domain.name: 1 / len(domains) for domain in domains}
    if name == "proportional":
        total = sum(domain.num_tokens for domain in domains)
        return {domain.name: domain.num_tokens / total for domain in domains}
    return _preset(name)


def _preset(name: str) -> Mapping[str, float]:
    if name not in PRESETS:
        choices = ", ".join(sorted([*PRESETS, "proportional", "uniform"]))
        raise UsageError(f"unknown weights {name!r}", where="weights", needed=f"one of {choices}, or a table")
    return PRESETS[name]
