"""Target architectures: one file, one table called `TARGET`, named after the model_type it writes."""

from __future__ import annotations

from prismoe import registry
from prismoe.target import Target

__all__ = ["all_targets", "find_target"]


def all_targets() -> dict[str, Target]:
    """Every target by name, sorted."""
    return {name: find_target(name) for name in registry.names(__name__)}


def find_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        UsageError: there is none; names the nearest.
    """
    target: Target = registry.load(__name__, name, where="target").TARGET
    return target
