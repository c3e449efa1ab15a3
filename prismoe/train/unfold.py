"""The scale s of the routed output during training: taken out of down_proj, applied to the weights of the experts.

Conversion folds s into down_proj, because stock classes have no place for it. AdamW moves every number by about the
learning rate and weight decay pulls at its size, so that in folded form down_proj learns s times more slowly, measured
against its own size, than in LLaMA-MoE, where s is a factor of the layer. Unfolded, the experts hold the published
magnitudes; a power of two only moves exponents, hence the layer computes the same bits either way and what is
saved is what folded weights would be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from prismoe.errors import UsageError
from prismoe.plan import Plan
from prismoe.train.routers import Router

__all__ = ["unfolded", "unfolding"]


def unfolding(
    plan: Plan | None, model: Any, routers: Sequence[Router], wanted: Literal["auto"] | bool = "auto"
) -> list[float]:
    """For each router the factor to take out of its experts' down_proj: the scale of its layer, or 1.

    1 everywhere when it is not `wanted`; with "auto" wherever it cannot be taken out without rounding: without a plan,
    where s is no power of two or does not lie on down_proj alone, and where shared neurons were absorbed into every
    expert, as only a part of the matrix has it then.

    Raises:
        UsageError: it is wanted and cannot be taken out of a layer.
    """
    layers = [layer for layer in plan.layers if layer is not None] if plan is not None else []
    if wanted is False or not routers:
        return [1.0] * len(routers)
    has_shared = any("shared" in name for name, _ in model.named_modules())
    exact = len(layers) == len(routers) and all(
        layer.spread == "down" and math.frexp(layer.scale)[0] == 0.5 and (has_shared or not len(layer.shared))
        for layer in layers
    )
    if wanted is True and not exact:
        raise UsageError(
            "no plan with a power of two as scale on down_proj alone" if layers else "no plan in the source",
            where="pretrain.unfold_scale",
            needed="a scale that can be taken out without rounding",
            hint="unfold_scale=auto trains it folded",
        )
    return [float(layer.scale) for layer in layers] if exact else [1.0] * len(routers)


@contextmanager
def unfolded(model: Any, routers: Sequence[Router], factors: Sequence[float]) -> Iterator[None]:
    """While the context is open, layer l has `factors[l]` on the experts' weights instead of in down_proj.

    The factors are powers of two: see `unfolding`.
    """
    changed = [
        (router, model.get_submodule(f"{router.name.rpartition('.')[0]}.experts").down_proj, factor)
        for router, factor in zip(routers, factors, strict=True)
        if factor != 1.0
    ]
    for router, down, factor in changed:
        _multiply(down, 1.0 / factor)
        router.factor = factor
    try:
        yield
    finally:
        for router, down, factor in changed:
            _multiply(down, factor)
            router.factor = 1.0


@torch.no_grad()
def _multiply(parameter: torch.nn.Parameter, factor: float) -> None:
    parameter.mul_(factor)
