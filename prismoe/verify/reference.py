"""An independent evaluation of a plan: float64 NumPy on the dense weights, one neuron at a time in spirit.

It shares nothing with the stock classes or with `convert`: y(x) = Σ_j c_j(x) · silu(g_j·x) (u_j·x) d_j, where c_j is
one for a shared neuron and scale · Σ over the kept experts that hold neuron j of their gate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prismoe.plan import LayerPlan

__all__ = ["Matrix", "count_wrong_choices", "gates", "kind", "neuron_weights", "plan_ffn"]

Matrix = npt.NDArray[np.float64]
_NEURON_BLOCK = 1024  # bounds the float64 copies to three blocks of [1024, D]


def kind(plan: LayerPlan, *, num_neurons: int) -> str:
    """ "partition" (each neuron once, counting shared ones), "upcycling" (each expert holds all) or "sharing"."""
    held = np.bincount(plan.experts.ravel(), minlength=num_neurons)
    num_experts = len(plan.experts)
    if plan.shared.size == 0 and all(np.array_equal(np.unique(row), np.arange(num_neurons)) for row in plan.experts):
        return "partition" if num_experts == 1 else "upcycling"
    once = held + np.bincount(plan.shared, minlength=num_neurons)
    return "partition" if np.all(once == 1) else "sharing"


def gates(router_logits_TE: Matrix, chosen_TK: npt.NDArray[np.int64]) -> Matrix:
    """[T, E] gates: softmax over the logits of the chosen experts, zero elsewhere."""
    kept = np.take_along_axis(router_logits_TE, chosen_TK, axis=1)
    kept = np.exp(kept - kept.max(axis=1, keepdims=True))
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
