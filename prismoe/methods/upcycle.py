"""Sparse upcycling (Komatsuzaki et al., 2212.05055): every expert is a copy of the dense FFN, or of a slice of it.

With renormalised top-k weights the copies add up to the dense FFN for any router, so step 0 is the dense model; noise
and redrawn neurons give that up for experts that can grow apart.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from prismoe.checkpoint import FFN
from prismoe.errors import NumericalError, UsageError
from prismoe.layerplan import FloatArray, LayerPlan, LayerView, Noise, Redraw, RouterDraw, Spread
from prismoe.recipe import IntArray


def split(
    layer: LayerView,
    *,
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8,
    shared: Annotated[int, Field(ge=0)] = 0,
    granularity: Annotated[int, Field(ge=1, le=4096)] = 1,
    permute: bool = False,
    spread: Spread = "sqrt",
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0,
    drop_sets: Literal["one", "per_matrix"] = "one",
) -> LayerPlan:
    """`num_experts` experts: copies of the F - `shared` neurons that are not always on, `granularity` slices to a copy.

    The slices of a copy are a virtual group (He et al., 2410.07524): they have equal router rows and are chosen
    together, so top_k is a multiple of `granularity` G, and a scale of G makes up for their gates. `spread` is how it
    lies on the matrices: "sqrt" on up and down is exact, "cube_root" on all three is the published rule and is not.
    `permute` cuts every copy along its own permutation, and draws which neurons are shared, else the first.
    `noise` is the std of what is added to each weight. `drop` is the share of each expert's neurons that are drawn anew
    with mean and std of what stood there (Drop-Upcycling, 2502.19261): `drop_sets` "one" set of neurons, as the paper
    has it, or a set "per_matrix", as its code has it.

    Raises:
        UsageError: numbers that do not divide.
        NumericalError: weights that are not finite (`drop` reads them).
    """
    routed = layer.num_neurons - shared
    for name, whole, part in (("granularity", num_experts, granularity), ("top_k", layer.top_k, granularity)):
        if whole % part:
            raise UsageError(f"{whole if name == 'top_k' else part}", where=name, needed=_needed(name, whole, part))
    if routed < granularity or routed % granularity:
        raise UsageError(
            f"{routed} routed neurons", where="granularity", needed=f"a multiple of {granularity}", hint="change shared"
        )
    generator = layer.generator()
    order = np.arange(layer.num_neurons, dtype=np.int32)
    if permute and shared:
        generator.shuffle(order)
    always, rest = np.sort(order[:shared]), np.sort(order[shared:])
    copies = num_experts // granularity
    if permute:
        cut = np.stack([generator.permutation(rest).reshape(granularity, -1) for _ in range(copies)])
        experts = np.sort(cut, axis=2).reshape(num_experts, -1)
    elif granularity > 1:
        experts = np.tile(rest.reshape(granularity, -1), (copies, 1))
    else:  # one row in memory, however many copies
        experts = np.broadcast_to(rest, (num_experts, routed))
    count = int(drop * experts.shape[1])
    return LayerPlan(
        experts=experts,
        shared=always,
        router=RouterDraw(std=0.02, seed=layer.seed),
        scale=float(granularity),
        spread=spread,
        group=granularity,
        redraw=_redraw(layer, experts, generator, count, 3 if drop_sets == "per_matrix" else 1) if count else None,
        noise=Noise(std=noise, seed=layer.seed) if noise else None,
    )


def _redraw(layer: LayerView, experts: IntArray, generator: np.random.Generator, count: int, sets: int) -> Redraw:
    ffn, width = layer.ffn(), experts.shape[1]
    drawn = [[np.sort(generator.permutation(width)[:count]) for _ in experts] for _ in range(sets)]
    slots: IntArray = np.array(drawn, np.int32)
    moments = np.stack([_moments(ffn, neurons, slots[:, e]) for e, neurons in enumerate(experts)])
    if not np.isfinite(moments).all():
        raise NumericalError("weights are not finite", where=f"layer {layer.index}", hint="fetch the checkpoint again")
    return Redraw(slots=slots, moments=moments, seed=layer.seed)


def _moments(ffn: FFN, neurons: IntArray, slots: IntArray) -> FloatArray:
    """[3, 2] mean and std of gate, up and down over the neurons that go. slots [1 or 3, R]."""
    found = np.empty((3, 2))
    for number, weights in enumerate((ffn.gate_FD, ffn.up_FD, ffn.down_DF.T)):
        gone = np.asarray(weights[neurons[slots[number % len(slots)]]], np.float64)
        found[number] = gone.mean(), gone.std()
    return found.astype(np.float32)


def _needed(name: str, whole: int, part: int) -> str:
    return f"a multiple of granularity {part}" if name == "top_k" else f"a divisor of {whole} experts"
