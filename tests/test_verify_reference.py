"""The float64 evaluation that `verify` holds stock models against, itself held against the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from prismoe.plan import LayerPlan, RouterDraw
from prismoe.verify import reference

Array = npt.NDArray[Any]


def layer_plan(experts: list[list[int]], shared: list[int], scale: float = 1.0) -> LayerPlan:
    return LayerPlan(np.array(experts, np.int32), np.array(shared, np.int32), RouterDraw(0.0, 0), scale)


def test_reference_is_the_sum_over_kept_experts_and_shared_neurons() -> None:
    """Against the definition spelled out token by token, expert by expert; overlapping experts, a neuron held twice."""
    rng = np.random.default_rng(0)
    x_TD, rows_ED = rng.normal(size=(6, 5)), rng.normal(size=(3, 5))
    gate_FD, up_FD, down_DF = rng.normal(size=(8, 5)), rng.normal(size=(8, 5)), rng.normal(size=(5, 8))
    plan = layer_plan([[0, 1, 2], [2, 3, 4], [5, 5, 6]], [7, 0], scale=1.7)

    def ffn(x_D: Array, neurons: Array) -> Array:
        z = gate_FD[neurons] @ x_D
        return down_DF[:, neurons] @ (z / (1 + np.exp(-z)) * (up_FD[neurons] @ x_D))

    logits_TE = x_TD @ rows_ED.T
    chosen_TK = np.argsort(-logits_TE, axis=1)[:, :2]
    expected = []
    for x_D, logits_E, chosen_K in zip(x_TD, logits_TE, chosen_TK, strict=True):
        probabilities = np.exp(logits_E) / np.exp(logits_E).sum()  # softmax over all, keep K, renormalise
        weights_K = probabilities[chosen_K] / probabilities[chosen_K].sum()
        routed = sum(w * ffn(x_D, plan.experts[e]) for w, e in zip(weights_K, chosen_K, strict=True))
        expected.append(1.7 * routed + ffn(x_D, plan.shared))
    weight_TF = reference.neuron_weights(plan, reference.gates(logits_TE, chosen_TK), num_neurons=8)
    found = reference.plan_ffn(x_TD, gate_FD=gate_FD, up_FD=up_FD, down_DF=down_DF, weight_TF=weight_TF)
    assert found == pytest.approx(np.array(expected), rel=1e-12, abs=1e-12)
    assert reference.count_wrong_choices(logits_TE, chosen_TK) == 0


def test_reference_survives_activations_that_overflow_exp() -> None:
    one = np.ones((1, 1))
    found = reference.plan_ffn(-1000 * one, gate_FD=one, up_FD=one, down_DF=one)
    assert found == pytest.approx(0)


@pytest.mark.parametrize(
    ("experts", "shared", "kind"),
    [
        ([[0, 2], [1, 3]], [], "partition"),
        ([[0], [3]], [1, 2], "partition"),
        ([[0, 1, 2, 3]], [], "partition"),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [], "upcycling"),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [0], "sharing"),
        ([[0, 1], [1, 2]], [3], "sharing"),
        ([[0, 1], [1, 2]], [], "sharing"),
        ([[0], [1]], [2], "sharing"),  # neuron 3 is lost: no setting equals the dense FFN
        ([[0, 1, 2, 2], [0, 1, 2, 3]], [], "sharing"),
    ],
)
def test_kind(experts: list[list[int]], shared: list[int], kind: str) -> None:
    assert reference.kind(layer_plan(experts, shared), num_neurons=4) == kind


def test_wrong_choices_are_counted_and_ties_forgiven() -> None:
    logits_TE = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 2.0, 2.0 + 1e-6], [3.0, 2.0, 1.0]])
    chosen_TK = np.array([[0, 1], [0, 2], [2, 0], [0, 1], [0, 0]])
    assert reference.count_wrong_choices(logits_TE, chosen_TK) == 2  # the second leaves a larger one, the last has one
