"""Branch-Train-MiX (Sukhbaatar et al., 2403.07816): models fine-tuned apart from one base become the experts.

Every expert is the whole FFN of one branch, chosen by a router that still has to be trained; everything else is
averaged over the experts' models, or kept from the base (as mergekit-moe does).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from prismoe.errors import UsageError
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw


def num_experts(arguments: Mapping[str, Any]) -> int:
    """How many experts `split` makes.

    Raises:
        UsageError: a single one.
    """
    count: int = len(arguments["branches"]) + arguments["with_base"]
    if count < 2:
        raise UsageError(
            f"{len(arguments['branches'])} branch makes {count} expert",
            where="branches",
            needed="at least 2 branches, or one and with_base=true",
        )
    return count


def donors(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The checkpoint of each expert: 0 is the base, b the b-th branch."""
    return tuple(range(0 if arguments["with_base"] else 1, len(arguments["branches"]) + 1))


def averaged(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The checkpoints whose mean everything outside the experts is."""
    return (0,) if arguments["rest"] == "base" else donors(arguments)


def split(
    layer: LayerView,
    *,
    branches: Annotated[list[str], Field(min_length=1)],
    with_base: bool = False,
    rest: Literal["mean", "base"] = "mean",
) -> LayerPlan:
    """One expert for each of `branches` (folders or hub names, fine-tuned from the source), in their order, and before
    them the source itself with `with_base`.

    The gates of the kept experts sum to one, so the scale is 1: branches that never left the base are the base again,
    whatever the router. `rest` is everything outside the experts, layers that stay dense included: the mean over the
    experts' models, as the paper has it, or the base's.
    """
    found = donors({"branches": branches, "with_base": with_base})
    everything = np.arange(layer.num_neurons, dtype=np.int32)
    return LayerPlan(
        experts=np.broadcast_to(everything, (len(found), layer.num_neurons)),
        shared=np.empty(0, np.int32),
        router=RouterDraw(std=0.02, seed=layer.seed),
        scale=1.0,
        donors=found,
    )
