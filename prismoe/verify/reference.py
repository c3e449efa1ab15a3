"""An independent evaluation of a plan: float64 NumPy on the dense weights, one neuron at a time in spirit.

It shares nothing with the stock classes or with `convert`: y(x) = Σ_j c_j(x) · silu(g_j·x) (u_j·x) d_j, where c_j is
one for a shared neuron and scale · Σ over the kept experts that hold neuron j of their gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import FFN
from prismoe.layerplan import LayerPlan
from prismoe.layerplan.draws import row_normals

__all__ = ["Matrix", "count_wrong_choices", "expert_by_expert", "gates", "kind", "neuron_weights", "plan_ffn"]

Matrix = npt.NDArray[np.float64]
_NEURON_BLOCK = 1024  # bounds the float64 copies to three blocks of [1024, D]


def kind(plan: LayerPlan, *, num_neurons: int) -> str:
    """What must equal the dense FFN.

    "partition" (each neuron once, counting shared ones): with all experts on. "upcycling" (each virtual group holds
    each neuron that is not shared once): as it is. "sharing" (overlapping experts, or neurons left out), "changed"
    (noise, redrawn neurons, a factor inside the activation), "branches" (neurons of other checkpoints): nothing does.
    """
    if plan.donors:
        return "branches"
    if plan.redraw is not None or plan.noise is not None or (plan.spread == "cube_root" and plan.scale != 1.0):
        return "changed"
    shared = np.bincount(plan.shared, minlength=num_neurons)
    if np.all(np.bincount(plan.experts.ravel(), minlength=num_neurons) + shared == 1):
        return "partition"
    groups = plan.experts.reshape(len(plan.experts) // plan.group, -1)
    copies = all(np.all(np.bincount(row, minlength=num_neurons) + shared == 1) for row in groups)
    # Beside a shared expert the routed sum has to come out at exactly one.
    return "upcycling" if copies and (not plan.shared.size or plan.scale == plan.group) else "sharing"


def gates(router_logits_TE: Matrix, chosen_TK: npt.NDArray[np.int64], *, gate: str = "softmax") -> Matrix:
    """[T, E] gates: softmax over the logits of the chosen experts, or their sigmoids over the sum; zero elsewhere."""
    kept = np.take_along_axis(router_logits_TE, chosen_TK, axis=1)
    kept = np.exp(kept - kept.max(axis=1, keepdims=True)) if gate == "softmax" else 1.0 / (1.0 + np.exp(-kept))
    gate_TE = np.zeros_like(router_logits_TE)
    np.put_along_axis(gate_TE, chosen_TK, kept / kept.sum(axis=1, keepdims=True), axis=1)
    return gate_TE


def count_wrong_choices(router_logits_TE: Matrix, chosen_TK: npt.NDArray[np.int64]) -> int:
    """Tokens whose chosen experts are not the K largest logits, forgiving a gap that float32 cannot resolve."""
    rows = np.arange(len(chosen_TK))[:, None]
    chosen = np.zeros(router_logits_TE.shape, dtype=bool)
    chosen[rows, chosen_TK] = True
    smallest_kept = np.where(chosen, router_logits_TE, np.inf).min(axis=1)
    largest_left = np.where(chosen, -np.inf, router_logits_TE).max(axis=1)
    slack = 1e-5 * np.abs(router_logits_TE).max(axis=1) + 1e-7
    twice = chosen.sum(axis=1) != chosen_TK.shape[1]
    return int(np.count_nonzero(twice | (smallest_kept < largest_left - slack)))


def neuron_weights(plan: LayerPlan, gate_TE: Matrix, *, num_neurons: int) -> Matrix:
    """[T, F] factor c_j of every dense neuron for every token."""
    held_EF = np.zeros((len(plan.experts), num_neurons))
    for expert, neurons in enumerate(plan.experts):
        np.add.at(held_EF[expert], neurons, 1.0)
    weight_TF = plan.scale * (gate_TE @ held_EF)
    return weight_TF + np.bincount(plan.shared, minlength=num_neurons)


def expert_by_expert(x_TD: Matrix, plan: LayerPlan, gate_TE: Matrix, *, layer: int, ffns: Sequence[FFN]) -> Matrix:
    """[T, D] output in float64 of a plan that is "changed" or of "branches": every expert with weights of its own.

    `ffns` are the dense FFNs of the base and of each branch.
    """
    base = ffns[0]
    only_shared = np.bincount(plan.shared, minlength=len(base.gate_FD)).astype(np.float64)
    y_TD = plan_ffn(x_TD, gate_FD=base.gate_FD, up_FD=base.up_FD, down_DF=base.down_DF, weight_TF=only_shared[None])
    power = {"down": (0.0, 0.0, 1.0), "sqrt": (0.0, 0.5, 0.5), "cube_root": (1 / 3, 1 / 3, 1 / 3)}[plan.spread]
    for expert, neurons in enumerate(plan.experts):
        ffn = ffns[plan.donors[expert]] if plan.donors else base
        gate_WD, up_WD, down_WD = (
            _changed(weights[neurons], plan, plan.scale ** power[number], layer=layer, expert=expert, number=number)
            for number, weights in enumerate((ffn.gate_FD, ffn.up_FD, ffn.down_DF.T))
        )
        y_TD += gate_TE[:, expert, None] * plan_ffn(x_TD, gate_FD=gate_WD, up_FD=up_WD, down_DF=down_WD.T)
    return y_TD


def _changed(
    weights_WD: npt.NDArray[np.generic], plan: LayerPlan, factor: float, *, layer: int, expert: int, number: int
) -> npt.NDArray[np.generic]:
    """Weights of one expert, neurons first, with noise, redrawn neurons and factor; `number` is 0 gate, 1 up, 2 down.

    Drawn weights are made in float32 and rounded to the stored dtype: their exact bits are part of the plan.
    """
    if plan.noise is None and plan.redraw is None:
        return weights_WD.astype(np.float64) * factor
    exact: Any = np.float64 if weights_WD.dtype == np.float64 else np.float32
    found, (rows, columns) = weights_WD.astype(exact), weights_WD.shape if number < 2 else weights_WD.shape[::-1]
    seed = (plan.noise or plan.redraw).seed  # type: ignore[union-attr]
    stream = 3 * expert + number
    normals = np.stack([row_normals((seed, layer), stream=stream, row=row, count=columns) for row in range(rows)])
    normals = (normals if number < 2 else normals.T).astype(exact)
    if plan.noise is not None:
        found += exact(plan.noise.std) * normals
    if plan.redraw is not None:
        places = plan.redraw.slots[number % len(plan.redraw.slots), expert]
        mean, std = plan.redraw.moments[expert, number].astype(exact)
        found[places] = mean + std * normals[places]
    made: npt.NDArray[np.generic] = (found * exact(factor)).astype(weights_WD.dtype)
    return made


def plan_ffn(
    x_TD: Matrix,
    *,
    gate_FD: npt.NDArray[np.generic],
    up_FD: npt.NDArray[np.generic],
    down_DF: npt.NDArray[np.generic],
    weight_TF: Matrix | None = None,
) -> Matrix:
    """[T, D] output of the dense FFN in float64, each neuron weighted by `weight_TF` (None: all one)."""
    y_TD = np.zeros_like(x_TD)
    for start in range(0, len(gate_FD), _NEURON_BLOCK):
        block = slice(start, start + _NEURON_BLOCK)
        gate_TB = x_TD @ gate_FD[block].astype(np.float64).T
        # silu(z) = z/(1+exp(-z)); exp overflows to inf for very negative z, which is the right limit, 0
        with np.errstate(over="ignore"):
            hidden_TB = gate_TB / (1.0 + np.exp(-gate_TB)) * (x_TD @ up_FD[block].astype(np.float64).T)
        if weight_TF is not None:
            hidden_TB *= weight_TF[:, block]
        y_TD += hidden_TB @ down_DF[:, block].astype(np.float64).T
    return y_TD
