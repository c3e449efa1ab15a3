"""A mixture's folder without some experts, as recipes: tensors, config.json and plan. Reads no weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.convert.gather import draw
from prismoe.errors import InputError, UsageError
from prismoe.layerplan import LayerPlan, RouterDraw
from prismoe.plan import Plan
from prismoe.recipe import Copy, Fill, Recipe, Take
from prismoe.target import Target
from prismoe.train.fit import EXPERT_COUNTS

__all__ = ["carries_over", "remaining_config", "remaining_plan", "remaining_recipes"]

Kept = Mapping[int, Sequence[int]]
"""Layer number → its experts that stay, ascending, by their numbers before."""


def remaining_recipes(checkpoint: Checkpoint, target: Target, kept: Kept, *, num_experts: int) -> dict[str, Recipe]:
    """Every tensor of the folder that is written, in the order in which they are stored."""
    moved: dict[str, list[tuple[str, Recipe]]] = {}  # stored name → what becomes of it
    for layer, experts in kept.items():
        index = np.array(experts, np.int32)
        router = target.router.format(l=layer)
        moved[router] = [(router, Take(router, 0, index))]
        for slot in target.experts:
            if "{e}" not in slot.key:
                key = slot.key.format(l=layer)
                moved[key] = [(key, Take(key, 0, index))]
                continue
            names = [slot.key.format(l=layer, e=expert) for expert in range(num_experts)]
            places = {old: new for new, old in enumerate(experts)}
            for old, name in enumerate(names):
                moved[name] = [(names[places[old]], Copy(name))] if old in places else []
        for constant in target.constants:
            key = constant.key.format(l=layer)
            if constant.experts_axis is not None and key in checkpoint.tensors:
                moved[key] = [(key, Take(key, constant.experts_axis, index))]
    return {new: recipe for name in checkpoint.tensors for new, recipe in moved.get(name, [(name, Copy(name))])}


def remaining_config(checkpoint: Checkpoint, *, num_experts: int, remaining: int) -> dict[str, Any]:
    """config.json with the new count under every name that it has there.

    Raises:
        InputError: config.json counts other experts than the router has rows.
        UsageError: the router chooses groups of experts first, which would be others with fewer experts.
    """
    where = str(checkpoint.folder / "config.json")
    counts = {name: checkpoint.config[name] for name in EXPERT_COUNTS if checkpoint.config.get(name) is not None}
    for name, count in counts.items():
        if count != num_experts:
            raise InputError(f"{count!r}", where=f"{where}: {name}", needed=f"{num_experts}, the rows of the router")
    if not counts:
        raise InputError("no number of experts", where=where, needed=" or ".join(EXPERT_COUNTS))
    if checkpoint.config.get("n_group") not in (None, 1):
        raise UsageError(f"{checkpoint.config['n_group']}", where=f"{where}: n_group", needed="1: no groups of experts")
    return {**checkpoint.config, **dict.fromkeys(counts, remaining)}


def carries_over(plan: Plan) -> bool:
    """Whether a plan can speak of fewer experts: what is drawn anew in an expert goes by its number."""
    return all(layer is None or (layer.redraw is None and layer.noise is None) for layer in plan.layers)


def remaining_plan(plan: Plan, kept: Kept) -> Plan:
    """The plan of the experts that stay; the scale is what it was, because it lies in their weights."""
    layers = tuple(
        None if layer is None else _remaining_layer(layer, list(kept[number]), number, plan.hidden_size)
        for number, layer in enumerate(plan.layers)
    )
    count = max(len(layer.experts) for layer in plan.layers if layer is not None)
    origin = replace(plan.origin, arguments={**plan.origin.arguments, "pruned_from": count})
    return replace(plan, layers=layers, origin=origin)


def _remaining_layer(layer: LayerPlan, kept: list[int], number: int, hidden_size: int) -> LayerPlan:
    router = layer.router
    if isinstance(router, RouterDraw):
        shape, key = (len(layer.experts), hidden_size), (router.seed, number)
        router = draw(Fill(shape, "F32", std=router.std, key=key, repeat=layer.group))
    whole = math.prod(layer.experts.shape) and layer.experts.strides[0] == 0
    experts = layer.experts[: len(kept)] if whole else layer.experts[kept]
    donors = tuple(layer.donors[expert] for expert in kept) if layer.donors else ()
    return replace(layer, experts=experts, router=router[kept], donors=donors)
