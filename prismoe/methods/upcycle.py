"""Sparse upcycling (Komatsuzaki et al., 2212.05055): every expert is a copy of the whole dense FFN.

With renormalised top-k weights the copies add up to the dense FFN for any router, so step 0 is the dense model.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from prismoe.layerplan import LayerPlan, LayerView, RouterDraw


def split(
    layer: LayerView,
    *,
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8,
    router_std: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02,
) -> LayerPlan:
    """`num_experts` copies of F neurons, no scale."""
    every = np.arange(layer.num_neurons, dtype=np.int32)
    return LayerPlan(
        experts=np.broadcast_to(every, (num_experts, layer.num_neurons)),
        shared=np.empty(0, np.int32),
        router=RouterDraw(std=router_std, seed=layer.seed),
        scale=1.0,
    )
