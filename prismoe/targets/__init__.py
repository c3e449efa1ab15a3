"""Target architectures: one file, one table called `TARGET`, named after the model_type it writes."""

from __future__ import annotations

from prismoe import registry
from prismoe.checkpoint.family import DenseConfig
from prismoe.plan import PlanShape
from prismoe.target import Target, absorbed

__all__ = ["PREFERRED", "all_targets", "find_target", "holder"]

PREFERRED = (
    *("mixtral", "qwen3_moe", "granitemoeshared", "granitemoe", "granitemoehybrid", "granitemoe_swa", "qwen2_moe"),
    *("flex_olmo", "ernie4_5_moe", "cohere2_moe", "hunyuan_v1_moe", "glm4_moe"),
)
"""The order in which targets are tried: what runs in most places first, another kind of gate last."""


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


def holder(dense: DenseConfig, shape: PlanShape) -> str:
    """The settings that name the first target which holds the plan exactly, if need be with the shared neurons in
    every expert; empty where none does.
    """
    for stored, setting in ((shape, ""), (absorbed(shape), " convert.absorb=true")):
        for name in (*PREFERRED, "dense"):
            if not find_target(name).objections(dense, stored):
                return f"convert.target={name}{setting}"
    return ""
