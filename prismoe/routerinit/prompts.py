"""Each expert's row is the direction of the FFN inputs that its prompts give (mergekit-moe's "hidden" gates).

`prompt_states` of `prismoe.calibrate.prompts` runs the prompts through the dense model and writes the file.
"""

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prismoe.layerplan import LayerPlan, LayerView
from prismoe.layerplan.routerrows import as_router_rows, read_rows


def rows(
    layer: LayerView,
    plan: LayerPlan,
    *,
    prompt_states: str,
    router_std: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02,
) -> npt.NDArray[np.float32]:
    """Mean FFN input of each expert's prompts, less what all share, as large as N(0, router_std²).

    Raises:
        InputError: no such file, or one made for another number of experts or another model.
    """
    shape = (len(plan.experts) // plan.group, layer.hidden_size)
    states = read_rows(prompt_states, f"layers.{layer.index}.inputs", shape=shape)
    return np.repeat(as_router_rows(states, std=router_std), plan.group, axis=0)
