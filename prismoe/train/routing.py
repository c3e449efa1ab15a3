"""Watching the routers of a stock model: forward hooks that keep the latest logits and choices, and load statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from prismoe.errors import NumericalError

__all__ = ["LoadMeter", "Router", "check_router_gradients", "watch"]


@dataclass(eq=False)
class Router:
    """One stock router while it is watched: what it said in the latest forward pass.

    `logits_TE` are the raw logits with their graph, `chosen_TK` the experts that were used.
    """

    name: str
    module: torch.nn.Module
    num_experts: int
    top_k: int
    _logits: torch.Tensor | None = None
    _chosen: torch.Tensor | None = None

    @property
    def logits_TE(self) -> torch.Tensor:
        assert self._logits is not None, f"{self.name} has not been run"
        return self._logits

    @property
    def chosen_TK(self) -> torch.Tensor:
        assert self._chosen is not None, f"{self.name} has not been run"
        return self._chosen

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._logits, _, self._chosen = output

    def forget(self) -> None:
        """Drop the latest forward pass, so that its graph can be freed."""
        self._logits = self._chosen = None


@contextmanager
def watch(model: torch.nn.Module) -> Iterator[list[Router]]:
    """All routers of `model` in layer order, watched while the context is open; empty for a dense model.

    Stock classes declare which module speaks router logits; every such router of the supported classes
    returns (logits, weights, chosen experts).
    """
    recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    kind = getattr(recorder, "target_class", recorder)
    routers = []
    if kind is not None:
        for name, module in model.named_modules():
            if isinstance(module, kind):
                routers.append(Router(name, module, int(module.num_experts), int(module.top_k)))
    handles = [router.module.register_forward_hook(router._keep) for router in routers]
    try:
        yield routers
    finally:
        for handle in handles:
            handle.remove()
        for router in routers:
            router.forget()


class LoadMeter:
    """Sums of routing statistics over the micro-batches of one step."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = routers
        self._load = [torch.zeros(router.num_experts, dtype=torch.int64) for router in routers]
        self._entropy = [0.0] * len(routers)
        self._tokens = 0

    @torch.no_grad()
    def add(self) -> None:
        """Count the latest forward pass."""
        for index, router in enumerate(self._routers):
            chosen = router.chosen_TK.reshape(-1)
            self._load[index] += torch.bincount(chosen, minlength=router.num_experts).cpu()
            log_TE = torch.log_softmax(router.logits_TE.detach().float(), dim=-1)
            self._entropy[index] += float(-(log_TE.exp() * log_TE).sum())
        if self._routers:
            self._tokens += self._routers[0].logits_TE.shape[0]

    def summary(self) -> dict[str, Any]:
        """Of `result`: the mean entropy, the worst layer's `max_over_mean`, and `idle`."""
        whole = self.result()
        entropy = sum(whole["entropy"]) / len(whole["entropy"])
        return {"entropy": entropy, "max_over_mean": max(whole["max_over_mean"]), "idle": whole["idle"]}

    def result(self) -> dict[str, Any]:
        """`load`: share of assignments per layer and expert; `entropy`: mean over tokens, per layer, as a share of ln E
        (1 = undecided); `max_over_mean`: the busiest expert's load over the mean, per layer (1 = balanced);
        `idle`: experts without a single token, over all layers."""
        if not self._routers:
            return {}
        shares = [load.double() / int(load.sum()) for load in self._load]
        limits = [self._tokens * math.log(max(router.num_experts, 2)) for router in self._routers]
        return {
            "load": [[round(float(share), 5) for share in layer] for layer in shares],
            "entropy": [round(total / limit, 5) for total, limit in zip(self._entropy, limits, strict=True)],
            "max_over_mean": [round(float(layer.max() * len(layer)), 4) for layer in shares],
            "idle": sum(int((load == 0).sum()) for load in self._load),
        }


def check_router_gradients(routers: Sequence[Router], *, step: int) -> float:
    """Norm of the gradient over all router weights.

    Raises:
        NumericalError: a router has no gradient or one that is exactly zero: it would stay as it was drawn.
    """
    total = 0.0
    for router in routers:
        gradients = [parameter.grad for parameter in router.module.parameters() if parameter.requires_grad]
        norm = sum(float(gradient.double().norm()) ** 2 for gradient in gradients if gradient is not None)
        if norm == 0.0:
            raise NumericalError(
                "the router's gradient is exactly zero",
                where=f"{router.name}, step {step}",
                needed="a router that learns",
                hint="with top_k = 1 and renormalised weights only a balance loss reaches the router",
            )
        total += norm
    return math.sqrt(total)
