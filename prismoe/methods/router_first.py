"""The router comes first (LLaMA-MoE v2, 2411.15708): clusters of the FFN's inputs give its rows, and each expert gets
the neurons that matter to the tokens which the router will send there.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from prismoe.balance import balanced_kmeans
from prismoe.errors import UsageError
from prismoe.layerplan import LayerPlan, LayerView, equal_width
from prismoe.layerplan.routerrows import as_router_rows
from prismoe.layerplan.wanted import checked, greedy, most_wanted


def calibration(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What it asks of `calibrate`."""
    return {"quantities": ("inputs", "scores")}


def split(
    layer: LayerView,
    *,
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8,
    shared: Annotated[int, Field(ge=0)] = 0,
    centroid_std: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02,
) -> LayerPlan:
    """`num_experts` disjoint experts and `shared` always-on neurons (those most experts want), scaled by E/K.

    Inputs are clustered by direction into equal clusters; centroids become router rows as large as
    N(0, centroid_std²). Tokens are labelled by that router's first choice; |h·∂ℒ/∂h| summed by label is the importance.

    Raises:
        UsageError: no calibration with inputs and scores, fewer sampled tokens than experts, an expert without tokens.
        NumericalError: inputs or importances that are not finite.
    """
    width = equal_width(layer, num_experts=num_experts, shared=shared)
    stats = layer.stats()
    x_SD, scores_SF = np.asarray(stats.need("inputs"), np.float32), stats.need("scores")
    if len(x_SD) < num_experts:
        raise UsageError(f"{len(x_SD)} sampled tokens", where="calibration", needed=f"at least {num_experts}")
    seed = int(layer.generator().integers(2**63))
    rows_ED = as_router_rows(balanced_kmeans(x_SD, num_experts, metric="cosine", seed=seed).centroids, std=centroid_std)
    labels_S = (x_SD @ rows_ED.T).argmax(axis=1)
    tokens_E = np.bincount(labels_S, minlength=num_experts)
    if not tokens_E.all():
        raise UsageError(
            f"expert {int(tokens_E.argmin())} gets none of {len(x_SD)} sampled tokens",
            where=f"layer {layer.index}: router_first",
            hint="fewer experts, or calibrate with more sample_tokens",
        )
    sums_EF = np.stack([scores_SF[labels_S == e].astype(np.float32).sum(axis=0) for e in range(num_experts)])
    importance_EF = checked(sums_EF / tokens_E[:, None], num_experts=num_experts, layer=layer.index)
    always = most_wanted(importance_EF, width=width, count=shared) if shared else np.empty(0, np.int32)
    rest = np.setdiff1d(np.arange(layer.num_neurons, dtype=np.int32), always)
    return LayerPlan(
        experts=greedy(importance_EF, rest, width), shared=always, router=rows_ED, scale=num_experts / layer.top_k
    )
