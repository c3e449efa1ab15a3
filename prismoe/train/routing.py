"""Watching the routers of a stock model: forward hooks that keep the latest logits and choices, and load statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from prismoe.errors import NumericalError, UsageError
from prismoe.train.fit import num_experts
from prismoe.train.routers import AllReduce, Router, identity

__all__ = ["GradientGuard", "LoadMeter", "watch"]


@contextmanager
def watch(model: Any) -> Iterator[list[Router]]:
    """All routers of `model` in layer order, watched while the context is open; empty for a dense model.

    Stock classes declare which module speaks router logits; every such router of the supported classes
    returns (logits, weights, chosen experts).

    Raises:
        UsageError: the config speaks of experts but no router was found: they would train unwatched.
    """
    recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    kind = getattr(recorder, "target_class", recorder)
    routers = []
    if kind is not None:
        for name, module in model.named_modules():
            if isinstance(module, kind):
                routers.append(Router(name, module, int(module.num_experts), int(module.top_k)))
    if not routers and num_experts(model.config.to_dict()):
        raise UsageError(
            "a mixture whose routers are not declared by its class",
            where=str(model.config.model_type),
            needed="a stock class of our targets",
        )
    handles = [router.module.register_forward_hook(router.keep) for router in routers]
    try:
        yield routers
    finally:
        for handle in handles:
            handle.remove()
        for router in routers:
            router.forget()


class LoadMeter:
    """Sums of routing statistics over the micro-batches of one step; `total` adds a tensor up over all processes."""

    def __init__(self, routers: Sequence[Router], *, total: AllReduce = identity) -> None:
        self._routers, self._total = routers, total
        self._load: list[torch.Tensor | None] = [None] * len(routers)
        self._entropy: list[torch.Tensor | None] = [None] * len(routers)
        self._tokens = 0
        self._known: tuple[list[torch.Tensor], list[float], int] | None = None

    @torch.no_grad()
    def add(self) -> None:
        """Count the latest forward pass."""
        self._known = None
        for index, router in enumerate(self._routers):
            load_E = torch.bincount(router.chosen_TK.reshape(-1), minlength=router.num_experts)
            log_TE = torch.log_softmax(router.logits_TE.detach().float(), dim=-1)
            entropy = -(log_TE.exp() * log_TE).sum(dtype=torch.float64)
            before, entropy_before = self._load[index], self._entropy[index]
            self._load[index] = load_E if before is None else before + load_E
            self._entropy[index] = entropy if entropy_before is None else entropy_before + entropy
        if self._routers:
            self._tokens += self._routers[0].logits_TE.shape[0]

    def counts(self) -> list[list[int]]:
        """Assignments to each expert, layer by layer, of all processes; each of them has to ask."""
        return [load.long().tolist() for load in self._summed()[0]] if self._routers else []

    def summary(self) -> dict[str, Any]:
        """Of `result`: the mean entropy, the worst layer's `max_over_mean`, `idle` and `dominant`."""
        whole = self.result()
        entropy = sum(whole["entropy"]) / len(whole["entropy"])
        counts = {key: whole[key] for key in ("idle", "dominant")}
        return {"entropy": entropy, "max_over_mean": max(whole["max_over_mean"]), **counts}

    def result(self) -> dict[str, Any]:
        """`load`: share of assignments per layer and expert; `entropy`: mean over tokens, per layer, as a share of ln E
        (1 = undecided); `max_over_mean`: the busiest expert's load over the mean, per layer (1 = balanced);
        `idle`: experts without a single token, and `dominant`: experts chosen by more tokens than halfway from their
        fair share K/E to all of them, over all layers and by layer. Of all processes; each of them has to ask."""
        if not self._routers:
            return {}
        loads, entropies, tokens = self._summed()
        shares = [load.double() / int(load.sum()) for load in loads]
        most = [(1 / router.top_k + 1 / router.num_experts) / 2 for router in self._routers]  # shares of assignments
        limits = [tokens * math.log(max(router.num_experts, 2)) for router in self._routers]
        return {
            "load": [[round(float(share), 5) for share in layer] for layer in shares],
            "entropy": [round(total / limit, 5) for total, limit in zip(entropies, limits, strict=True)],
            "max_over_mean": [round(float(layer.max() * len(layer)), 4) for layer in shares],
            **_counted("idle", [load == 0 for load in loads]),
            **_counted("dominant", [share > limit for share, limit in zip(shares, most, strict=True)]),
        }

    def _summed(self) -> tuple[list[torch.Tensor], list[float], int]:
        """Load and entropy of each layer and the tokens, over all processes: one collective, exact counts."""
        if self._known is not None:
            return self._known
        loads = [
            torch.zeros(router.num_experts, dtype=torch.int64) if load is None else load.cpu()
            for router, load in zip(self._routers, self._load, strict=True)
        ]
        entropies = [0.0 if entropy is None else float(entropy) for entropy in self._entropy]
        numbers = [torch.tensor([self._tokens, *entropies], dtype=torch.float64), *(load.double() for load in loads)]
        head, *loads = self._total(torch.cat(numbers)).split([len(part) for part in numbers])
        self._known = loads, head[1:].tolist(), int(head[0])
        return self._known


def _counted(name: str, alarms: Sequence[torch.Tensor]) -> dict[str, Any]:
    by_layer = [int(layer.sum()) for layer in alarms]
    return {name: sum(by_layer), f"{name}_by_layer": by_layer}


class GradientGuard:
    """Sees to it that every router learns: a router without a gradient stays as it was drawn, and nobody notices.

    A share of the whole gradient below 1e-7 is rounding noise (top-1 with renormalised weights gives 3e-9). Copies of
    one expert make it so in the first step of an upcycled model, where it is right: hence three steps in a row.
    """

    def __init__(self, routers: Sequence[Router], *, patience: int = 3) -> None:
        self._routers = routers
        self._patience = patience
        self._silent = [0] * len(routers)

    def norms(self) -> list[float]:
        """Gradient norm of each router; take it before clipping."""
        norms = []
        for router in self._routers:
            gradients = [parameter.grad for parameter in router.module.parameters() if parameter.grad is not None]
            norms.append(math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)))
        return norms

    def check(self, norms: Sequence[float], *, whole: float, step: int) -> None:
        """Compare the router norms with that of the `whole` gradient.

        Raises:
            NumericalError: a router had no gradient for too many steps in a row.
        """
        for index, (router, norm) in enumerate(zip(self._routers, norms, strict=True)):
            self._silent[index] = 0 if norm > 1e-7 * whole or not router.learns else self._silent[index] + 1
            if self._silent[index] >= self._patience:
                raise NumericalError(
                    f"the router's gradient is zero ({norm:.0e} of {whole:.0e}) for {self._patience} steps",
                    where=f"{router.name}, step {step}",
                    needed="a router that learns",
                    hint="with top_k = 1 and renormalised weights only a balance loss reaches the router",
                )
