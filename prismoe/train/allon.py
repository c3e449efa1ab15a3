"""All experts of a layer at once: with what weight they are the dense FFN again, by the plan that made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prismoe.layerplan import LayerPlan
from prismoe.plan import Plan
from prismoe.train.routers import AllOn, Router

__all__ = ["all_on"]


def all_on(plan: Plan | None, model: Any, routers: Sequence[Router], *, trained: bool = False) -> list[AllOn | None]:
    """For each router what is known of its experts together; None without a plan of as many layers.

    Of weights that were `trained` since the plan made them nothing is exact. A neuron that m experts hold, each with
    the scale s and the same weight w, counts m·s·w times: w = 1/(m·s) is the dense FFN if every routed neuron is in m
    of them and its experts are the dense neurons, unchanged. Shared neurons that were absorbed into every expert count
    E·w times instead, which has to be once as well.
    """
    layers = [layer for layer in plan.layers if layer is not None] if plan is not None else []
    if plan is None or len(layers) != len(routers):
        return [None] * len(routers)
    has_shared = any("shared" in name for name, _ in model.named_modules())
    found = [_all_on(layer, plan.num_neurons, has_shared=has_shared) for layer in layers]
    return [replace(one, exact=one.exact and not trained) for one in found]


def _all_on(layer: LayerPlan, num_neurons: int, *, has_shared: bool) -> AllOn:
    held_F = np.bincount(layer.experts.ravel(), minlength=num_neurons)
    routed_F = np.ones(num_neurons, bool)
    routed_F[layer.shared] = False
    times = float(held_F[routed_F].mean())
    weight = 1.0 / (times * layer.scale)
    even = bool((held_F[routed_F] == times).all() and not held_F[~routed_F].any())
    absorbed = len(layer.shared) > 0 and not has_shared
    once = not absorbed or abs(len(layer.experts) * weight - 1.0) < 1e-9
    return AllOn(weight, exact=even and once and layer.unchanged)
