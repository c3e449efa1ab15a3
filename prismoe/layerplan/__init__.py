"""One layer of a plan, and what a method may look at to make it. Names no tensor and depends on no target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import FFN
from prismoe.errors import UsageError
from prismoe.recipe import IntArray
from prismoe.stats import NeuronStats

__all__ = [
    "LayerPlan",
    "LayerView",
    "Noise",
    "Redraw",
    "RouterDraw",
    "Spread",
    "equal_width",
    "every_neuron_once",
    "layer_problem",
    "no_statistics",
]

FloatArray = npt.NDArray[np.float32]
Spread = Literal["down", "sqrt", "cube_root"]
"""Which matrices carry the scale s: down alone, √s on up and down (both exact), or ∛s on all three (not exact)."""


@dataclass(frozen=True)
class RouterDraw:
    """Router rows drawn from N(0, std²) under Philox key (seed, layer); std 0 gives zero rows."""

    std: float
    seed: int


@dataclass(frozen=True)
class Noise:
    """N(0, std²) added to every weight of the routed experts, before any factor."""

    std: float
    seed: int


@dataclass(frozen=True, eq=False)
class Redraw:
    """Neurons of each expert that are drawn anew from N(mean, std²), before any factor.

    slots [P, E, R]: places within the expert (not neurons), ascending; P = 1 is one set for all three matrices, P = 3
    a set for each of gate, up and down. moments [E, 3, 2]: mean and std for gate, up and down.
    """

    slots: IntArray
    moments: FloatArray
    seed: int


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer. `experts` is [E, W]: row e lists the dense neurons (ascending) of expert e.

    Disjoint rows are a partition, overlapping rows are neuron sharing, every neuron in each row is upcycling.
    `shared` ([S], may be empty) are the neurons of the always-on shared expert. `scale` multiplies the routed
    output, `spread` says which matrices carry it. `router` is [E, D] float32 rows, or how to draw them.

    `group` consecutive experts are a virtual group (He et al., 2410.07524): one copy of the FFN in slices, whose router
    rows are equal. `redraw` and `noise` make copies differ.

    `donors` says for each expert whose neurons it holds: 0 the base's, b those of the plan's b-th branch. Empty: all
    the base's, as the shared ones always are.
    """

    experts: IntArray
    shared: IntArray
    router: FloatArray | RouterDraw
    scale: float
    spread: Spread = "down"
    group: int = 1
    redraw: Redraw | None = None
    noise: Noise | None = None
    donors: tuple[int, ...] = ()

    @property
    def factors(self) -> dict[str, float]:
        """What the gate, up and down matrices of the routed experts are multiplied by."""
        root, cube = math.sqrt(self.scale), math.cbrt(self.scale)
        gate, up, down = {"down": (1.0, 1.0, self.scale), "sqrt": (1.0, root, root), "cube_root": (cube, cube, cube)}[
            self.spread
        ]
        return {"gate": gate, "up": up, "down": down}

    @property
    def unchanged(self) -> bool:
        """Whether the routed experts compute scale · neurons of the base, exactly but for rounding."""
        exact = self.spread != "cube_root" or self.scale == 1.0
        return exact and self.redraw is None and self.noise is None and not self.donors


def no_statistics() -> NeuronStats:
    """What `LayerView.stats` does where no calibration was given.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        "needs statistics of the neurons", where="calibration", needed="a folder that `prismoe calibrate` made"
    )


@dataclass(frozen=True)
class LayerView:
    """What a method may look at: one layer's sizes, the plan's top_k, its random stream, and on request its weights
    and its statistics (of a calibration of the same checkpoint).
    """

    index: int
    num_neurons: int
    hidden_size: int
    top_k: int
    seed: int
    ffn: Callable[[], FFN]
    stats: Callable[[], NeuronStats] = no_statistics

    def generator(self) -> np.random.Generator:
        """A Philox stream of (seed, layer), far from the one that router rows are drawn from."""
        key = np.array([self.seed, self.index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))


def equal_width(layer: LayerView, *, num_experts: int, shared: int = 0) -> int:
    """Neurons of each of `num_experts` equal experts after `shared` neurons were taken out.

    Raises:
        UsageError: they do not divide evenly; names the nearest numbers that do.
    """
    neurons, routed = layer.num_neurons, layer.num_neurons - shared
    if routed < num_experts or routed % num_experts:
        raise UsageError(
            f"{neurons} neurons less {shared} shared do not divide into {num_experts} experts",
            where="num_experts",
            needed=f"a divisor of {routed}, nearest {_nearest_divisors(routed, num_experts)}" if routed > 0 else "",
            hint=f"or shared={shared + routed % num_experts}; any expert width is fine, zero-neuron padding is lossless"
            if routed > num_experts
            else "fewer shared neurons or fewer experts",
        )
    return routed // num_experts


def every_neuron_once(layer: LayerPlan, *, num_neurons: int) -> bool:
    """Whether experts and shared expert together hold each neuron exactly once."""
    if layer.experts.size + layer.shared.size != num_neurons:
        return False
    held = np.bincount(layer.experts.ravel(), minlength=num_neurons)
    return bool((held + np.bincount(layer.shared, minlength=num_neurons) == 1).all())


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
    if not _finite(layer.scale) or layer.scale <= 0:
        return f"scale {layer.scale} is not a positive number"
    if layer.spread not in get_args(Spread):
        return f"spread {layer.spread!r} is not one of {', '.join(get_args(Spread))}"
    if type(layer.group) is not int or layer.group < 1 or len(layer.experts) % layer.group:
        return f"virtual groups of {layer.group} among {len(layer.experts)} experts"
    if layer.donors and not (len(layer.donors) == len(layer.experts) and all(map(_count, layer.donors))):
        return f"donors {list(layer.donors)} of {len(layer.experts)} experts"[:80]
    return _router_problem(layer, hidden_size) or _change_problem(layer)


def _router_problem(layer: LayerPlan, hidden_size: int) -> str:
    router, count = layer.router, len(layer.experts)
    if isinstance(router, RouterDraw):
        return "" if _seed(router.seed) and _finite(router.std) and router.std >= 0 else f"router {router}"
    if router.shape != (count, hidden_size) or not np.isfinite(router).all():
        return f"router {list(router.shape)} is not finite [{count}, {hidden_size}]"
    grouped = router.reshape(-1, layer.group, hidden_size)
    return "" if (grouped == grouped[:, :1]).all() else "router rows of a virtual group differ"


def _change_problem(layer: LayerPlan) -> str:
    noise, redraw = layer.noise, layer.redraw
    if noise is not None and not (_seed(noise.seed) and _finite(noise.std) and noise.std > 0):
        return f"noise {noise}"
    if redraw is None:
        return ""
    if noise is not None and noise.seed != redraw.seed:
        return "noise and redraw have different seeds"
    count, width = layer.experts.shape
    slots, moments = redraw.slots, redraw.moments
    if not _seed(redraw.seed) or slots.ndim != 3 or slots.shape[0] not in (1, 3) or slots.shape[1] != count:
        return f"redraw {list(slots.shape)} is not [1 or 3, {count}, R]"
    if not slots.size or slots.min() < 0 or slots.max() >= width or (np.diff(slots) <= 0).any():
        return f"redraw does not name ascending places within 0..{width - 1}"
    if moments.shape != (count, 3, 2) or not np.isfinite(moments).all() or (moments[..., 1] < 0).any():
        return f"redraw moments {list(moments.shape)} are not finite [{count}, 3, 2] with std ≥ 0"
    return ""


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _finite(value: Any) -> bool:
    """A number that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3.4e38


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(map(str, below + above))
