"""Balance without a loss (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, section 2.1.2): a bias that only chooses.

The K experts of the greatest score + b are kept; their weights come from the scores alone. After each step b_e moves by
`rate` towards balance: b_e += rate · sign(mean load - load_e), loads counted over the whole global batch.

Where the model's class has a slot for such a bias (GLM-4-MoE, Ernie 4.5) b lives there and is saved with the model. No
other stock class has one: b is training state, and the saved model chooses without it. How much that changes is
measured at every step (`moved`: the share of assignments that the bare router would have given to other experts);
held-out losses are always those of the bare router. `fade` [a, b] takes the bias to zero from step a to step b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from prismoe.errors import UsageError
from prismoe.train.routers import AllReduce, Change, Moment, Policy, Routed, Router

if TYPE_CHECKING:
    import torch

__all__ = ["BiasBalanced", "attach"]


class BiasBalanced(Policy):
    """The policy on a model; biases without a slot in it are its state."""

    def __init__(
        self, routers: Sequence[Router], all_reduce: AllReduce, *, rate: float, fade: tuple[int, int] | None
    ) -> None:
        import torch

        from prismoe.train.weighting import router_weight, weighting

        super().__init__(routers)
        if fade is not None and fade[0] >= fade[1]:
            raise UsageError(f"{list(fade)}", where="pretrain.fade", needed="two steps, the earlier one first")
        self._all_reduce = all_reduce
        self._rate = rate
        self._fade = fade
        self._share = 1.0
        self._moment: Moment | None = None
        self._rules = [weighting(router) for router in routers]
        self._bias: list[torch.Tensor] = []
        self._in_model = [rule.bias_E is not None for rule in self._rules]
        self._stock: list[torch.Tensor | None] = [None] * len(routers)
        self._load: list[torch.Tensor] = []
        self._moved: list[torch.Tensor] = []  # assignments of this step that the bare router would give to others
        for layer, (router, rule) in enumerate(zip(routers, self._rules, strict=True)):
            device = router_weight(router).device
            self._bias.append(torch.zeros(router.num_experts, device=device) if rule.bias_E is None else rule.bias_E)
            self._load.append(torch.zeros(router.num_experts, device=device))
            self._moved.append(torch.zeros((), device=device))
            if rule.bias_E is None:
                router.changes.append(self._change(layer))
        if fade is not None and any(self._in_model):
            raise UsageError("fade", where="pretrain.router bias_balanced", needed="no fade: this model keeps the bias")

    def begin(self, moment: Moment) -> None:
        if not moment.continues(self._moment):  # the last step may have been left out, and its loads with it
            for counts in (*self._load, *self._moved):
                counts.zero_()
        self._moment = moment
        if self._fade is not None:
            first, last = self._fade
            self._share = min(1.0, max(0.0, (last - moment.step) / (last - first)))

    def loss(self) -> torch.Tensor:
        import torch

        # Counted here and not in the forward pass, which may run twice (activation checkpointing).
        for layer, router in enumerate(self.routers):
            self._load[layer] += torch.bincount(router.chosen_TK.flatten(), minlength=router.num_experts)
            stock_TK = self._stock[layer]
            if stock_TK is not None:
                self._moved[layer] += (router.chosen_TK[:, :, None] != stock_TK[:, None]).all(dim=2).sum()
        return super().loss()

    def metrics(self) -> dict[str, float]:
        """`moved` of the step over all processes, and the greatest bias."""
        import torch

        if not self.routers:
            return {}
        loads_LE, moved_L = torch.stack(self._load), torch.stack(self._moved)
        moved, total = self._all_reduce(torch.stack([moved_L.sum(), loads_LE.sum()]).double())
        return {
            "moved": float(moved / total),
            "bias_max": max(float(_whole(bias).abs().max()) for bias in self._bias),
        }

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{router.name}.bias": bias
            for router, bias, in_model in zip(self.routers, self._bias, self._in_model, strict=True)
            if not in_model
        }

    def after_step(self) -> None:
        import torch

        if not self.routers:
            return
        with torch.no_grad():
            for load_E, bias in zip(self._all_reduce(torch.stack(self._load)), self._bias, strict=True):
                move = self._rate * torch.sign(load_E.mean() - load_E).view(bias.shape)
                bias += _parted_like(bias, move)

    def _change(self, layer: int) -> Change:
        from prismoe.train.weighting import reroute

        rule = self._rules[layer]

        def change(router: Router, hidden_TD: torch.Tensor, routed: Routed) -> Routed:
            self._stock[layer] = routed.chosen_TK
            chosen_TK = rule.choose(routed.logits_TE, router.top_k, self._share * self._bias[layer])
            return reroute(rule, routed, chosen_TK, routed.logits_TE)

        return change


def _whole(bias: torch.Tensor) -> torch.Tensor:
    """Ernie's bias is a parameter: over several processes each holds a part of it. Every one of them has to ask."""
    whole: torch.Tensor = bias.full_tensor() if hasattr(bias, "full_tensor") else bias
    return whole


def _parted_like(bias: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """What of `whole`, the same in all processes, goes with the part of `bias` that this one holds."""
    if not hasattr(bias, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    part: Any = bias
    # Nobody has to be asked for it: no source rank.
    return distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None)


def attach(
    routers: Sequence[Router],
    all_reduce: AllReduce,
    *,
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3,
    fade: tuple[int, int] | None = None,
) -> BiasBalanced:
    """Balance by a selection bias that moves by `rate` a step."""
    return BiasBalanced(routers, all_reduce, rate=rate, fade=fade)
