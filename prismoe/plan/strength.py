"""How large a mixture's FFN output will be beside the dense one's: what its scale comes to, before anything is run."""

from __future__ import annotations

import math

import numpy as np

from prismoe.layerplan import LayerPlan
from prismoe.plan import Plan

__all__ = ["FAR_OFF", "expected_strength", "far_off", "strength_warnings"]

FAR_OFF = 2.0
"""A factor. LLaMA-MoE's own 4 of 16 comes to 1/2, its 2 of 8 to 1; 4 of 8 comes to 0.35, and docs/construction.md
shows what that costs."""


def expected_strength(plan: Plan) -> float | None:
    """√(E‖MoE‖² / ‖dense‖²), the geometric mean over the layers: neurons of equal norm that are independent of each
    other, experts (whole virtual groups) chosen evenly, equal gates. None where experts are not the dense neurons, and
    for a single expert, whose size is what was kept.
    """
    layers = [layer for layer in plan.layers if layer is not None]
    if any(not layer.unchanged or len(layer.experts) == 1 for layer in layers):
        return None
    logs = [math.log(_squared(layer, plan.top_k, plan.num_neurons)) for layer in layers]
    return math.exp(sum(logs) / len(logs) / 2)


def _squared(layer: LayerPlan, top_k: int, num_neurons: int) -> float:
    """Mean over the neurons of E(shared + s·c/K)², where c of the K kept experts hold the neuron (hypergeometric)."""
    total, kept = len(layer.experts) // layer.group, top_k // layer.group
    held_F = np.bincount(layer.experts.ravel(), minlength=num_neurons) / total
    always_F = np.zeros(num_neurons)
    always_F[layer.shared] = 1.0
    mean = kept * held_F
    variance = kept * held_F * (1 - held_F) * (total - kept) / max(1, total - 1)
    factor = layer.scale / top_k
    return float((always_F + 2 * factor * always_F * mean + factor**2 * (variance + mean**2)).mean())


def far_off(ratio: float) -> bool:
    """Whether a ratio of sizes is more than `FAR_OFF` from 1; a hair over the edge is not."""
    return abs(math.log(ratio)) > math.log(FAR_OFF) + 1e-9


def strength_warnings(plan: Plan) -> tuple[str, ...]:
    """One line where the scale makes the output more than `FAR_OFF` times too small or too large."""
    found = expected_strength(plan)
    if found is None or not far_off(found):
        return ()
    scales = sorted({layer.scale for layer in plan.layers if layer is not None})
    named = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    return (
        f"with scale {named} and {plan.top_k} experts kept, FFN outputs are about {found:.2g} times the dense model's: "
        "plan.scale=norm keeps their expected size, plan.scale=measured their size on calibration text",
    )
