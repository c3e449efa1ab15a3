"""A plan: which neurons of each dense FFN become which expert. It names no tensor and depends on no target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.recipe import IntArray

__all__ = ["LayerPlan", "Origin", "Plan", "RouterDraw"]

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
class Origin:
    """Where a plan came from: enough to make it again."""

    method: str
    arguments: dict[str, Any]
    seed: int
    source: str  # fingerprint of the dense checkpoint (sha256 over config and tensor headers)


@dataclass(frozen=True, eq=False)
class Plan:
    """One `LayerPlan` per layer, or None where the layer stays dense. `num_neurons` F and `hidden_size` D are the dense model's."""

    layers: tuple[LayerPlan | None, ...]
    top_k: int
    num_neurons: int
    hidden_size: int
    origin: Origin = field(repr=False)
