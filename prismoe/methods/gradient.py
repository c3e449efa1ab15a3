"""Neurons by first-order Taylor importance on clusters of text (LLaMA-MoE 2406.16554, section 3.1): cluster c's expert
gets what cluster c needs.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from prismoe.errors import UsageError
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw, equal_width
from prismoe.layerplan.wanted import checked, greedy, most_wanted, top


def calibration(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What it asks of `calibrate`: a cluster of text for each expert."""
    return {"quantities": ("importance",), "clusters": arguments["num_experts"]}


def split(
    layer: LayerView,
    *,
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8,
    mode: Literal["independent", "inner", "inter"] = "independent",
    shared: Annotated[int, Field(ge=0)] = 0,
    share: bool = False,
    width: Annotated[int, Field(ge=1)] | None = None,
) -> LayerPlan:
    """`num_experts` experts from the importance of the first as many data clusters, scaled by E/K.

    independent: disjoint, by the greedy maximum. inner: each its top `width` neurons (default F/E); experts overlap,
    and neurons that nobody wants are gone. inter: the `shared` most wanted neurons are always on; the experts are
    disjoint, or with `share` each takes its top `width` of the rest (default (F - shared)/E).

    Raises:
        UsageError: no calibration, fewer data clusters than experts, widths that do not fit.
        NumericalError: an importance that is not finite.
    """
    overlap = mode == "inner" or share
    for name, value, wrong, needed in (
        ("shared", shared, (mode == "inter") != (shared > 0), "more than 0 with mode=inter, else 0"),
        ("share", share, share and mode != "inter", "mode=inter"),
        ("width", width, width is not None and not overlap, "experts that overlap: mode=inner, or inter with share"),
    ):
        if wrong:
            raise UsageError(f"{value} with mode={mode}", where=name, needed=needed)
    size = width if width is not None else equal_width(layer, num_experts=num_experts, shared=shared)
    if size > layer.num_neurons - shared:
        raise UsageError(f"{size}", where="width", needed=f"at most {layer.num_neurons - shared} neurons")
    found = layer.stats().need("importance")
    importance_EF = checked(found, num_experts=num_experts, layer=layer.index)
    always = most_wanted(importance_EF, width=size, count=shared) if shared else np.empty(0, np.int32)
    rest = np.setdiff1d(np.arange(layer.num_neurons, dtype=np.int32), always)
    if overlap:
        experts = np.stack([rest[top(scores_F[rest], size)] for scores_F in importance_EF])
    else:
        experts = greedy(importance_EF, rest, size)
    return LayerPlan(
        experts=experts,
        shared=always,
        router=RouterDraw(std=0.02, seed=layer.seed),
        scale=num_experts / layer.top_k,
    )
