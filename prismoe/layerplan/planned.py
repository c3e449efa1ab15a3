"""What planned experts compute on calibration inputs, in float32 NumPy: for routers and scales that look at outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import FFN
from prismoe.errors import NumericalError, UsageError
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw
from prismoe.layerplan.draws import tensor_normals

__all__ = ["activations", "expert_outputs", "neuron_outputs", "router_rows", "sampled_inputs"]

Floats = npt.NDArray[np.float32]


def sampled_inputs(layer: LayerView) -> Floats:
    """[S, D] FFN inputs that calibration kept.

    Raises:
        UsageError: no calibration, or one without inputs.
    """
    inputs: Floats = np.asarray(layer.stats().need("inputs"), np.float32)
    return inputs


def activations(x_SD: Floats, ffn: FFN) -> Floats:
    """[S, F] h = silu(gate·x) · (up·x), the input of the down matrix.

    Raises:
        NumericalError: it is not finite.
    """
    z_SF = x_SD @ _wide(ffn.gate_FD).T
    with np.errstate(over="ignore"):  # exp of a very negative number: silu is 0 there
        z_SF /= 1.0 + np.exp(-z_SF)
    z_SF *= x_SD @ _wide(ffn.up_FD).T
    if not np.isfinite(z_SF.max()) or not np.isfinite(z_SF.min()):
        raise NumericalError("activations are not finite", where="calibration inputs", hint="look for damaged weights")
    return z_SF


def neuron_outputs(h_SF: Floats, neurons: npt.NDArray[Any], ffn: FFN) -> Floats:
    """[S, D] what some neurons add to the output."""
    output: Floats = h_SF[:, neurons] @ _wide(ffn.down_DF[:, neurons]).T
    return output


def expert_outputs(h_SF: Floats, plan: LayerPlan, ffn: FFN, *, what: str) -> Iterator[Floats]:
    """[S, D] of each routed expert in turn, without the scale.

    Raises:
        UsageError: noise, redrawn neurons or cube-root factors: the experts are no longer dense neurons; `what` asked.
    """
    if not plan.unchanged:
        raise UsageError("experts are not made of the dense neurons", where=what, hint="choose another for this plan")
    for neurons in plan.experts:
        yield neuron_outputs(h_SF, neurons, ffn)


def router_rows(layer: LayerView, plan: LayerPlan) -> npt.NDArray[np.float64]:
    """[E, D] router rows, drawn if that is what the plan says."""
    if isinstance(plan.router, RouterDraw):
        shape = (len(plan.experts), layer.hidden_size)
        return tensor_normals((plan.router.seed, layer.index), shape, repeat=plan.group) * plan.router.std
    return plan.router.astype(np.float64)


def _wide(weights: npt.NDArray[Any]) -> Floats:
    return np.asarray(weights, np.float32)
