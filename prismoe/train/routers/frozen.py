"""Routers stay as they are: the rest of the model trains around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prismoe.train.routers import AllReduce, Policy, Router

if TYPE_CHECKING:
    import torch

__all__ = ["Frozen", "attach"]


class Frozen(Policy):
    """Drops the routers' gradients, so that neither an update nor weight decay reaches them."""

    def __init__(self, routers: Sequence[Router]) -> None:
        super().__init__(routers)
        for router in routers:
            router.learns = False

    def before_step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        for router in self.routers:
            for parameter in router.module.parameters():
                parameter.grad = None


def attach(routers: Sequence[Router], all_reduce: AllReduce) -> Frozen:
    """Train everything but the routers."""
    return Frozen(routers)
