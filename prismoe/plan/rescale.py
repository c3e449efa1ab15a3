"""The factor on the routed output. Gates of the kept experts sum to one, so a plan that keeps K of E slices is too
small; how much too small is a choice, and the certificate reports what came of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from prismoe.errors import NumericalError
from prismoe.layerplan import LayerPlan, LayerView
from prismoe.layerplan.planned import activations, expert_outputs, neuron_outputs, router_rows, sampled_inputs

__all__ = ["Scale", "rescaled"]

Scale = (
    Annotated[float, Field(gt=0, allow_inf_nan=False)]
    | Literal["auto", "paper", "mean", "norm", "unit", "measured", "none"]
)


def rescaled(layer: LayerView, plan: LayerPlan, *, scale: Scale = "auto") -> LayerPlan:
    """`plan` with another scale. With E experts of which K are kept, n_j of them holding neuron j:

    auto: the method's own. none: 1. unit: K, every kept expert at full strength. paper: E/K (LLaMA-MoE).
    mean: the routed neurons keep their average, 1/mean(n_j/E) (a partition: E).
    norm: they keep their expected norm as if independent and evenly chosen, 1/√mean(n_j/E · …) (a partition: √(E·K)).
    measured: Σ‖MoE(x)‖² = Σ‖dense(x)‖² over the calibration inputs, with this plan's router.

    Raises:
        UsageError: "measured" without calibration inputs, or of experts that are not dense neurons.
        NumericalError: "measured" where no factor can do it.
    """
    if scale == "auto":
        return plan
    experts, kept = len(plan.experts), layer.top_k
    if scale == "measured":
        return replace(plan, scale=_measured(layer, replace(plan, scale=1.0)))
    named = {
        "none": lambda: 1.0,
        "unit": lambda: float(kept),
        "paper": lambda: experts / kept,
        "mean": lambda: 1.0 / float(_held(layer, plan).mean()),
        "norm": lambda: _norm(layer, plan),
    }
    return replace(plan, scale=named[scale]() if isinstance(scale, str) else float(scale))


def _held(layer: LayerView, plan: LayerPlan) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Share of the experts that hold each neuron which is not shared."""
    if plan.experts.strides[0] == 0:  # copies of one row
        held = np.bincount(plan.experts[0], minlength=layer.num_neurons).astype(np.float64)
    else:
        held = np.bincount(plan.experts.ravel(), minlength=layer.num_neurons) / len(plan.experts)
    return np.delete(held, plan.shared)


def _norm(layer: LayerView, plan: LayerPlan) -> float:
    """Choosing K of E at random, neuron j is held by a hypergeometric number of the kept ones, each with gate 1/K.

    Virtual groups are chosen whole, so the choice is among groups.
    """
    total, kept = len(plan.experts) // plan.group, layer.top_k // plan.group
    share = _held(layer, plan) * plan.group
    variance = kept * share * (1 - share) * (total - kept) / max(1, total - 1)
    return 1.0 / math.sqrt(float((variance + (kept * share) ** 2).mean())) * layer.top_k


def _measured(layer: LayerView, plan: LayerPlan) -> float:
    ffn, x_SD = layer.ffn(), sampled_inputs(layer)
    h_SF = activations(x_SD, ffn)
    logits_SE = x_SD @ router_rows(layer, plan).T
    # Stable, so that equal logits keep the first experts, as the stock top-k does.
    chosen_SK = np.argsort(-logits_SE, axis=1, kind="stable")[:, : layer.top_k]
    gates = np.exp(np.take_along_axis(logits_SE - logits_SE.max(axis=1, keepdims=True), chosen_SK, axis=1))
    gate_SE = np.zeros_like(logits_SE)
    np.put_along_axis(gate_SE, chosen_SK, gates / gates.sum(axis=1, keepdims=True), axis=1)
    routed_SD = np.zeros_like(x_SD)
    for expert, output_SD in enumerate(expert_outputs(h_SF, plan, ffn, what="scale=measured")):
        routed_SD += gate_SE[:, expert, None].astype(np.float32) * output_SD
    shared_SD = neuron_outputs(h_SF, plan.shared, ffn)
    dense_SD = neuron_outputs(h_SF, np.arange(layer.num_neurons), ffn)
    # ‖shared + s·routed‖² = ‖dense‖², the positive root.
    a, b = float(np.vdot(routed_SD, routed_SD)), float(np.vdot(routed_SD, shared_SD))
    c = float(np.vdot(shared_SD, shared_SD)) - float(np.vdot(dense_SD, dense_SD))
    inside = b * b - a * c
    found = (-b + math.sqrt(inside)) / a if a > 0 and inside >= 0 else math.nan
    if not found > 0:
        raise NumericalError(
            "no positive factor gives the dense norm",
            where=f"layer {layer.index}: scale=measured",
            hint="the shared expert alone is larger than the dense FFN; choose a number",
        )
    return found
