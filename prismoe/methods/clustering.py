"""Neurons that look alike in one expert (LLaMA-MoE 2406.16554, 3.1, "Independent-Clustering"; MoEfication 2110.01786):
balanced k-means over the rows of up_proj or gate_proj, each of unit length.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from prismoe.balance import balanced_kmeans
from prismoe.errors import NumericalError
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw, equal_width


def split(
    layer: LayerView,
    *,
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8,
    matrix: Literal["up", "gate"] = "up",
    metric: Literal["l2", "cosine"] = "l2",
    restarts: Annotated[int, Field(ge=1, le=100)] = 1,
) -> LayerPlan:
    """Cut F neurons into `num_experts` equal clusters of rows of `matrix`, the best of `restarts`, scaled by E/K.

    Raises:
        UsageError: the neurons do not divide evenly.
        NumericalError: a weight that is not finite.
    """
    width = equal_width(layer, num_experts=num_experts)
    ffn = layer.ffn()
    rows_FD = np.array(ffn.up_FD if matrix == "up" else ffn.gate_FD, np.float32)
    lengths = np.linalg.norm(rows_FD, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise NumericalError(
            f"{matrix}_proj is not finite", where=f"layer {layer.index}", hint="fetch the weights again"
        )
    # A row of zeros has no direction: it stays at the origin under l2, and anywhere will do under cosine.
    rows_FD /= np.where(lengths > 0, lengths, 1)
    if metric == "cosine":
        rows_FD[lengths[:, 0] == 0, 0] = 1
    seed = int(layer.generator().integers(2**63))
    labels = balanced_kmeans(rows_FD, num_experts, metric=metric, seed=seed, restarts=restarts).labels
    return LayerPlan(
        experts=np.argsort(labels, kind="stable").reshape(num_experts, width).astype(np.int32),
        shared=np.empty(0, np.int32),
        router=RouterDraw(std=0.02, seed=layer.seed),
        scale=num_experts / layer.top_k,
    )
