"""Two plans side by side: how far they agree about which neurons belong together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.balance.assignment import assign
from prismoe.errors import UsageError
from prismoe.layerplan import LayerPlan, RouterDraw
from prismoe.plan import Plan, plan_shape

__all__ = ["Comparison", "LayerComparison", "compare_plans"]


@dataclass(frozen=True)
class LayerComparison:
    """One layer; None where either plan has nothing to compare.

    same: share of the neurons' places in experts that agree, after the experts of both plans were paired as well as
    they can be; 1 is the same split. chance: what two random splits of these sizes have on average, unpaired.
    shared: neurons that both hold in the shared expert, of those that either does. scales: of both.
    router: "equal", "differs", or None.
    """

    layer: int
    same: float | None
    chance: float | None
    shared: float | None
    scales: tuple[float | None, float | None]
    router: str | None


@dataclass(frozen=True)
class Comparison:
    """`settings` are those of origin and shape that differ, by name, with both values."""

    plans: tuple[str, str]
    same_source: bool
    settings: dict[str, tuple[Any, Any]]
    same: float | None  # mean over the layers that have one
    layers: tuple[LayerComparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def compare_plans(first: str | Path | Plan, second: str | Path | Plan) -> Comparison:
    """Compare two plans of one model.

    Raises:
        InputError: a file that is not a plan.
        UsageError: plans for models of different sizes.
    """
    one, two = (plan if isinstance(plan, Plan) else Plan.load(plan) for plan in (first, second))
    sizes = [(len(plan.layers), plan.num_neurons, plan.hidden_size) for plan in (one, two)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"(layers, neurons, hidden) are {sizes[0]} and {sizes[1]}", where="compare", needed="plans of one model"
        )
    names = [("a plan" if isinstance(plan, Plan) else str(plan)) for plan in (first, second)]
    pairs = zip(one.layers, two.layers, strict=True)
    layers = tuple(_layer(index, a, b) for index, (a, b) in enumerate(pairs) if a is not None or b is not None)
    found = [layer.same for layer in layers if layer.same is not None]
    facts, others = _settings(one), _settings(two)
    return Comparison(
        plans=(names[0], names[1]),
        same_source=one.origin.source == two.origin.source,
        settings={
            name: (facts.get(name), others.get(name))
            for name in sorted(facts.keys() | others.keys())
            if facts.get(name) != others.get(name)
        },
        same=sum(found) / len(found) if found else None,
        layers=layers,
    )


def _settings(plan: Plan) -> dict[str, Any]:
    origin, shape = plan.origin, plan_shape(plan)
    sizes = {name: getattr(shape, name) for name in ("num_experts", "top_k", "expert_width", "shared_width")}
    branches = {"checkpoints": ", ".join(found[:12] for found in plan.branches)} if plan.branches else {}
    return {"method": origin.method, "seed": origin.seed, **origin.arguments, **branches, **sizes}


def _layer(index: int, one: LayerPlan | None, two: LayerPlan | None) -> LayerComparison:
    scales = (None if one is None else float(one.scale), None if two is None else float(two.scale))
    if one is None or two is None:
        return LayerComparison(index, None, None, None, scales, None)
    either = len(np.union1d(one.shared, two.shared))
    same, chance = _same(one, two) if len(one.experts) == len(two.experts) else (None, None)
    return LayerComparison(
        layer=index,
        same=same,
        chance=chance,
        shared=len(np.intersect1d(one.shared, two.shared)) / either if either else None,
        scales=scales,
        router="equal" if _same_router(one, two) else "differs",
    )


def _same(one: LayerPlan, two: LayerPlan) -> tuple[float, float]:
    overlap = _overlap(one.experts, two.experts)
    pairs = assign(-overlap.astype(np.float64), np.ones(len(overlap), np.int64)).labels
    places = max(one.experts.size, two.experts.size)
    return float(overlap[np.arange(len(overlap)), pairs].sum() / places), float(overlap.mean() * len(overlap) / places)


def _overlap(one: npt.NDArray[np.int32], two: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """[E, E] neurons that expert i of one plan and expert j of the other both hold."""
    num_neurons = 1 + int(max(one.max(), two.max()))
    held = np.zeros((len(one), num_neurons), np.float32)
    for row, neurons in zip(held, one, strict=True):
        row[neurons] = 1
    return np.stack([held[:, neurons].sum(axis=1) for neurons in two], axis=1).astype(np.int64)


def _same_router(one: LayerPlan, two: LayerPlan) -> bool:
    if isinstance(one.router, RouterDraw) or isinstance(two.router, RouterDraw):
        both = isinstance(one.router, RouterDraw) and isinstance(two.router, RouterDraw)
        return both and one.router == two.router
    return np.array_equal(one.router, two.router)
