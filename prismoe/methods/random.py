"""Random partition (LLaMA-MoE 2406.16554, section 3.1, "Independent-Random"): equal, disjoint, drawn once per layer."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from prismoe.errors import UsageError
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw


def split(
    layer: LayerView,
    *,
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8,
    shared: Annotated[int, Field(ge=0)] = 0,
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["paper"] = "paper",
    router_std: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02,
) -> LayerPlan:
    """Cut F neurons into `shared` always-on ones and `num_experts` equal experts.

    `scale` multiplies the routed output; "paper" is E/K. Inside an expert the neurons keep their dense order.

    Raises:
        UsageError: the neurons that are left do not divide evenly.
    """
    neurons, routed = layer.num_neurons, layer.num_neurons - shared
    if routed < num_experts or routed % num_experts:
        raise UsageError(
            f"{neurons} neurons less {shared} shared do not divide into {num_experts} experts",
            where="num_experts",
            needed=f"a divisor of {routed}, nearest {_nearest_divisors(routed, num_experts)}" if routed > 0 else "",
            hint=f"or shared={shared + routed % num_experts}; any expert width is fine, zero-neuron padding is lossless"
            if routed > num_experts
            else "fewer shared neurons or fewer experts",
        )
    order = layer.generator().permutation(neurons).astype(np.int32)
    return LayerPlan(
        experts=np.sort(order[shared:].reshape(num_experts, -1), axis=1),
        shared=np.sort(order[:shared]),
        router=RouterDraw(std=router_std, seed=layer.seed),
        scale=num_experts / layer.top_k if scale == "paper" else scale,
    )


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(map(str, below + above))
