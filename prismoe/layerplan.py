"""One layer of a plan, and what a method may look at to make it. Names no tensor and depends on no target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import FFN
from prismoe.recipe import IntArray

__all__ = ["LayerPlan", "LayerView", "RouterDraw", "layer_problem"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RouterDraw:
    """Router rows drawn from N(0, std²) under Philox key (seed, layer); std 0 gives zero rows."""

    std: float
    seed: int


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer. `experts` is [E, W]: row e lists the dense neurons (ascending) of expert e.

    Disjoint rows are a partition, overlapping rows are neuron sharing, every neuron in each row is upcycling.
    `shared` ([S], may be empty) are the neurons of the always-on shared expert. `scale` multiplies the routed
    output. `router` is [E, D] float32 rows, or how to draw them.
    """

    experts: IntArray
    shared: IntArray
    router: FloatArray | RouterDraw
    scale: float


@dataclass(frozen=True)
class LayerView:
    """What a method may look at: one layer's sizes, the plan's top_k, its random stream, and its weights on request."""

    index: int
    num_neurons: int
    hidden_size: int
    top_k: int
    seed: int
    ffn: Callable[[], FFN]

    def generator(self) -> np.random.Generator:
        """A Philox stream of (seed, layer), far from the one that router rows are drawn from."""
        key = np.array([self.seed, self.index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))


def layer_problem(layer: LayerPlan, *, num_neurons: int, hidden_size: int) -> str:
    """What is wrong with a plan of one layer, so that no later stage has to doubt an index; empty when nothing is."""
    if layer.experts.ndim != 2 or not layer.experts.size or layer.shared.ndim != 1:
        return f"experts {list(layer.experts.shape)} and shared {list(layer.shared.shape)} are not [E, W] and [S]"
    # Rows that share one memory are one row: copies of a wide FFN are checked once.
    experts = layer.experts[:1] if layer.experts.strides[0] == 0 else layer.experts
    for name, ids in (("experts", experts), ("shared", layer.shared)):
        if ids.size and (ids.min() < 0 or ids.max() >= num_neurons):
            return f"{name} name a neuron outside 0..{num_neurons - 1}"
        if (np.diff(ids) <= 0).any():
            return f"{name} are not in ascending order or repeat a neuron"
    router = layer.router
    if isinstance(router, RouterDraw):
        if type(router.seed) is not int or not 0 <= router.seed < 2**63 or not _finite(router.std) or router.std < 0:
            return f"router {router}"
    elif router.shape != (len(layer.experts), hidden_size) or not np.isfinite(router).all():
        return f"router {list(router.shape)} is not finite [{len(layer.experts)}, {hidden_size}]"
    if not _finite(layer.scale) or layer.scale <= 0:
        return f"scale {layer.scale} is not a positive number"
    return ""


def _finite(value: Any) -> bool:
    """A number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3.4e38
