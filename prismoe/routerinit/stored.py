"""Rows from a file, spelled router=from:FILE: a plan with stored rows, or any .safetensors with `layers.N.router`."""

import numpy as np
import numpy.typing as npt

from prismoe.layerplan import LayerPlan, LayerView
from prismoe.layerplan.routerrows import read_rows


def rows(layer: LayerView, plan: LayerPlan, *, router_file: str) -> npt.NDArray[np.float32]:
    """[E, D] float32 `layers.N.router`.

    Raises:
        InputError: no such file or tensor, or one of another shape.
    """
    name = f"layers.{layer.index}.router"
    return read_rows(router_file, name, shape=(len(plan.experts), layer.hidden_size))
