"""The static control: no routing at all, one smaller FFN of the most important neurons.

Whatever a mixture claims at some active size, this is what the same size gives without a router. The plan is a single
expert that is always on: any target holds it, and target `dense` writes it in the source's own architecture.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from prismoe.errors import NumericalError, UsageError
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw
from prismoe.layerplan.wanted import top


def calibration(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What it asks of `calibrate`."""
    asked = {"random": (), "gradient": ("importance",), "activation": ("activation",)}
    return {"quantities": asked[arguments["by"]]}


def split(
    layer: LayerView,
    *,
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    by: Literal["random", "gradient", "activation"] = "activation",
) -> LayerPlan:
    """Keep ⌊F · keep⌋ neurons.

    gradient: |h·∂ℒ/∂h| a token over all text. activation: √mean(h²) · ‖d_j‖, the size of what neuron j adds to the
    output, with d_j its column of down_proj.

    Raises:
        UsageError: nothing is left, or no calibration.
        NumericalError: an importance that is not finite.
    """
    count = math.floor(layer.num_neurons * keep)
    if not count:
        raise UsageError(f"{keep} of {layer.num_neurons} neurons", where="keep", needed="at least one neuron")
    if by == "random":
        scores_F = layer.generator().permutation(layer.num_neurons).astype(np.float64)
    elif by == "gradient":
        importance_CF, tokens_C = layer.stats().need("importance"), layer.stats().need("cluster_tokens")
        scores_F = tokens_C @ importance_CF.astype(np.float64)
    else:
        lengths_F = np.linalg.norm(np.asarray(layer.ffn().down_DF, np.float32), axis=0)
        scores_F = np.sqrt(layer.stats().need("mean_square").astype(np.float64)) * lengths_F
    if not np.isfinite(scores_F).all():
        raise NumericalError("importance is not finite", where=f"layer {layer.index}", hint="calibrate again in fp32")
    return LayerPlan(
        experts=top(scores_F, count)[None],
        shared=np.empty(0, np.int32),
        router=RouterDraw(std=0.0, seed=layer.seed),
        scale=1.0,
    )
