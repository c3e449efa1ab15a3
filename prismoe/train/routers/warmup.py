"""Routers first: for a number of steps nothing else is trained, then everything is.

The first stage of two-stage training as in LLaMA-MoE's own ablations (router alone, then router and experts): a
randomly drawn router sends gradients of the wrong tokens into experts that are good already. A learning rate for the
routers alone would be another thing and is not this. Give it beside a policy that balances.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prismoe.train.routers import AllReduce, Moment, Policy, Router

if TYPE_CHECKING:
    import torch

__all__ = ["Warmup", "attach"]


class Warmup(Policy):
    """Drops every gradient but the routers' (and those of policies) during the first steps."""

    def __init__(self, routers: Sequence[Router], *, router_steps: int) -> None:
        super().__init__(routers)
        self._router_steps = router_steps
        self._active = False

    def begin(self, moment: Moment) -> None:
        self._active = moment.step < self._router_steps

    def before_step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        if not self._active or not self.routers:
            return
        spared = {id(parameter) for router in self.routers for parameter in router.module.parameters()}
        for parameter in parameters:
            if id(parameter) not in spared:
                parameter.grad = None

    def metrics(self) -> dict[str, float]:
        return {"routers_only": float(self._active)}


def attach(
    routers: Sequence[Router], all_reduce: AllReduce, *, router_steps: Annotated[int, Field(ge=1)] = 100
) -> Warmup:
    """Train the routers alone for `router_steps` steps."""
    return Warmup(routers, router_steps=router_steps)
