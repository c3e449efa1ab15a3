"""The factor on the routed output against the formulas, and against what it promises on real activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prismoe.errors import NumericalError, UsageError
from prismoe.layerplan import LayerPlan, LayerView, Noise, RouterDraw
from prismoe.layerplan.planned import router_rows
from prismoe.methods import random, upcycle
from prismoe.plan.rescale import rescaled
from prismoe.verify import reference
from tests.views import HIDDEN, random_ffn, statistics, view

NONE = np.empty(0, np.int32)


def sharing(*experts: list[int], shared: list[int] | None = None) -> LayerPlan:
    always = np.array(shared or [], np.int32)
    return LayerPlan(np.array(experts, np.int32), always, RouterDraw(0.02, 0), scale=1.0)


@pytest.mark.parametrize(
    ("experts", "top_k", "scale", "factor"),
    [
        # N/k, N, k·√(N/k) and the unit gate, of a partition in N with gates that sum to one
        (16, 4, "paper", 4.0),
        (8, 2, "paper", 4.0),
        (16, 2, "paper", 8.0),
        (16, 4, "mean", 16.0),
        (16, 4, "norm", 8.0),
        (8, 2, "norm", 4.0),
        (8, 1, "norm", 8**0.5),
        (8, 2, "unit", 2.0),
        (8, 2, "none", 1.0),
        (8, 2, 1.7, 1.7),
        (8, 8, "norm", 8.0),
        (8, 8, "mean", 8.0),
        (8, 8, "unit", 8.0),
    ],
)
def test_of_a_partition(experts: int, top_k: int, scale: Any, factor: float) -> None:
    layer = view(48, top_k=top_k)
    for shared in (0, 16):
        plan = random.split(layer, num_experts=experts, shared=shared)
        assert rescaled(layer, plan, scale=scale).scale == pytest.approx(factor)
    assert rescaled(layer, plan).scale == experts / top_k


@pytest.mark.parametrize("scale", ["mean", "norm"])
@pytest.mark.parametrize(("granularity", "shared"), [(1, 0), (4, 0), (2, 8)])
def test_of_copies_is_what_makes_them_exact(scale: Any, granularity: int, shared: int) -> None:
    layer = view(24, top_k=4)
    plan = upcycle.split(layer, num_experts=8, granularity=granularity, shared=shared, permute=True)
    assert rescaled(layer, replace(plan, scale=99.0), scale=scale).scale == pytest.approx(granularity)


@pytest.mark.parametrize(
    "plan", [sharing([0, 1, 2], [1, 2, 3], [2, 3, 4]), sharing([0, 1], [1, 2], [2, 5], [0, 3], shared=[4])]
)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_of_overlapping_experts_over_every_choice(plan: LayerPlan, top_k: int) -> None:
    """Every choice of K experts at gate 1/K, neurons as independent unit vectors: mean and norm by enumeration."""
    from itertools import combinations

    layer = view(6, top_k=top_k)
    routed = np.setdiff1d(np.arange(6), plan.shared)
    weights = []
    for kept in combinations(range(len(plan.experts)), top_k):
        held = np.bincount(plan.experts[list(kept)].ravel(), minlength=6) / top_k
        weights.append(held[routed])
    means = np.array(weights).mean()
    norm = np.sqrt((np.array(weights) ** 2).sum(axis=1).mean() / len(routed))
    assert rescaled(layer, plan, scale="mean").scale == pytest.approx(1 / means)
    assert rescaled(layer, plan, scale="norm").scale == pytest.approx(1 / norm)


def calibrated(neurons: int = 48, *, top_k: int = 2) -> tuple[LayerView, Any, np.ndarray]:
    ffn, x_TD = random_ffn(neurons), np.random.default_rng(1).standard_normal((256, HIDDEN)).astype(np.float32)
    return view(neurons, top_k=top_k, ffn=ffn, stats=statistics(neurons, inputs=x_TD)), ffn, x_TD


def output(layer: LayerView, plan: LayerPlan, ffn: Any, x_TD: np.ndarray) -> np.ndarray:
    """By the evaluation that `verify` uses."""
    logits = x_TD.astype(np.float64) @ router_rows(layer, plan).T
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : layer.top_k]
    weight = reference.neuron_weights(plan, reference.gates(logits, chosen), num_neurons=layer.num_neurons)
    parts = {"gate_FD": ffn.gate_FD, "up_FD": ffn.up_FD, "down_DF": ffn.down_DF}
    return reference.plan_ffn(x_TD.astype(np.float64), **parts, weight_TF=weight)


@pytest.mark.parametrize("shared", [0, 16])
def test_measured_gives_the_dense_norm(shared: int) -> None:
    layer, ffn, x_TD = calibrated()
    plan = rescaled(layer, random.split(layer, num_experts=8, shared=shared), scale="measured")
    dense = reference.plan_ffn(x_TD.astype(np.float64), gate_FD=ffn.gate_FD, up_FD=ffn.up_FD, down_DF=ffn.down_DF)
    ratio = np.linalg.norm(output(layer, plan, ffn, x_TD)) / np.linalg.norm(dense)
    assert ratio == pytest.approx(1, abs=1e-5)
    assert plan.scale != rescaled(layer, plan, scale="norm").scale


def test_measured_of_copies_is_one_and_of_groups_their_size() -> None:
    for granularity in (1, 2):
        layer, _, _ = calibrated()
        plan = upcycle.split(layer, num_experts=4, granularity=granularity)
        assert rescaled(layer, plan, scale="measured").scale == pytest.approx(granularity, rel=1e-5)


def test_what_cannot_be_measured() -> None:
    layer, _, _ = calibrated()
    with pytest.raises(UsageError, match="needs statistics of the neurons"):
        rescaled(view(48), random.split(layer), scale="measured")
    noisy = replace(random.split(layer), noise=Noise(0.1, 0))
    with pytest.raises(UsageError, match="scale=measured: experts are not made of the dense neurons"):
        rescaled(layer, noisy, scale="measured")
    # Neuron 1 cancels neuron 0, and the shared expert has only one of them.
    ffn = random_ffn(3)
    ffn.gate_FD[1], ffn.up_FD[1], ffn.down_DF[:, 1] = ffn.gate_FD[0], ffn.up_FD[0], -ffn.down_DF[:, 0]
    ffn.down_DF[:, 2] *= 1e-3
    x_TD = np.random.default_rng(1).standard_normal((64, HIDDEN)).astype(np.float32)
    layer = view(3, top_k=1, ffn=ffn, stats=statistics(3, inputs=x_TD))
    with pytest.raises(NumericalError, match="layer 0: scale=measured: no positive factor gives the dense norm"):
        rescaled(layer, sharing([2], [2], shared=[0]), scale="measured")
