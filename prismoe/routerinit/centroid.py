"""Each expert's row is the mean direction of its neurons' gate rows: what its neurons look for (as in ExpertWeaver,
2602.15521, and the warm start of LLaMA-MoE's router).
"""

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prismoe.errors import UsageError
from prismoe.layerplan import LayerPlan, LayerView
from prismoe.layerplan.routerrows import as_router_rows


def rows(
    layer: LayerView,
    plan: LayerPlan,
    *,
    router_std: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02,
    router_matrix: Literal["gate", "up"] = "gate",
) -> npt.NDArray[np.float32]:
    """Means of the L2-normalised rows of each expert, less what all share, as large as N(0, router_std²).

    Raises:
        UsageError: experts of several checkpoints, whose rows differ by their training and not by what they look for.
    """
    if plan.donors:
        raise UsageError(
            "experts of several checkpoints",
            where="router=centroid",
            needed="experts cut from one",
            hint="router=random",
        )
    ffn = layer.ffn()
    weights_FD = ffn.gate_FD if router_matrix == "gate" else ffn.up_FD
    found = np.empty((len(plan.experts), layer.hidden_size))
    for expert, neurons in enumerate(plan.experts):
        wide = np.asarray(weights_FD[neurons], np.float32)
        found[expert] = (wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)).mean(axis=0)
    return as_router_rows(found, std=router_std)
