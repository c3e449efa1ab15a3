"""Rows fitted to what each expert really does: ridge regression of the log norm of its output on the FFN's input."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prismoe.errors import UsageError
from prismoe.layerplan import LayerPlan, LayerView
from prismoe.layerplan.planned import activations, expert_outputs, sampled_inputs


def calibration(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What it asks of `calibrate`."""
    return {"quantities": ("inputs",)}


def rows(
    layer: LayerView, plan: LayerPlan, *, ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
) -> npt.NDArray[np.float32]:
    """Solves (XᵀX + ridge·mean(diag)·I) W = XᵀY over the calibration inputs X [S, D], Y [S, E] the log of each expert's
    output norm less the mean over experts (which changes neither the choice nor a gate): a kept expert's gate is then
    in proportion to the norm that the fit expects of it.

    Raises:
        UsageError: no calibration inputs, or experts that are not dense neurons.
    """
    ffn, x_SD = layer.ffn(), sampled_inputs(layer)
    h_SF = activations(x_SD, ffn)
    norms = [np.linalg.norm(out_SD, axis=1) for out_SD in expert_outputs(h_SF, plan, ffn, what="router=regressed")]
    norms_SE = np.stack(norms, axis=1).astype(np.float64)
    floor = 1e-6 * norms_SE.max()
    if floor == 0.0:
        raise UsageError("every expert gives zero", where=f"layer {layer.index}: router=regressed")
    target_SE = np.log(np.maximum(norms_SE, floor))
    target_SE -= target_SE.mean(axis=1, keepdims=True)
    wide = x_SD.astype(np.float64)
    gram_DD = wide.T @ wide
    gram_DD[np.diag_indices_from(gram_DD)] += ridge * np.trace(gram_DD) / len(gram_DD)
    return np.linalg.solve(gram_DD, wide.T @ target_SE).T.astype(np.float32)
