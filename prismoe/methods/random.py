"""Random partition (LLaMA-MoE 2406.16554, section 3.1, "Independent-Random"): equal, disjoint, drawn once per layer."""

from typing import Annotated

import numpy as np
from pydantic import Field

from prismoe.layerplan import LayerPlan, LayerView, RouterDraw, equal_width


def split(
    layer: LayerView,
    *,
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8,
    shared: Annotated[int, Field(ge=0)] = 0,
) -> LayerPlan:
    """Cut F neurons into `shared` always-on ones and `num_experts` equal experts, scaled by E/K.

    Inside an expert the neurons keep their dense order.

    Raises:
        UsageError: the neurons that are left do not divide evenly.
    """
    width = equal_width(layer, num_experts=num_experts, shared=shared)
    order = layer.generator().permutation(layer.num_neurons).astype(np.int32)
    return LayerPlan(
        experts=np.sort(order[shared:].reshape(num_experts, width), axis=1),
        shared=np.sort(order[:shared]),
        router=RouterDraw(std=0.02, seed=layer.seed),
        scale=num_experts / layer.top_k,
    )
