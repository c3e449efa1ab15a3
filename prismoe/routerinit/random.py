"""Rows from a normal distribution: what every published upcycling and LLaMA-MoE-style model starts from."""

from typing import Annotated

from pydantic import Field

from prismoe.layerplan import LayerPlan, LayerView, RouterDraw


def rows(
    layer: LayerView, plan: LayerPlan, *, router_std: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
) -> RouterDraw:
    """N(0, router_std²), rows of a virtual group equal."""
    return RouterDraw(std=router_std, seed=layer.seed)
