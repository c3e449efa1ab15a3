"""Expert capacity (GShard, Lepikhin et al. 2020; Switch, Fedus et al. 2021): what an expert cannot hold is dropped.

Within a group of n tokens an expert takes at most ⌈factor · n · K / E⌉ assignments, as Megatron counts them (the paper
of Llama 3's upcycling leaves out K). `drop` "position" keeps the first tokens of the group, "random" keeps those of the
smallest hash of (seed, step, layer, token, expert). A dropped assignment gets weight 0: the token goes on through the
residual connection and its other experts, whose weights stay as they are. It is still computed: on a stock model
this is what a capacity does to learning, and none of the time that one saves. Groups are `group_tokens` tokens with
consecutive numbers, with 0 one sequence: the same under any sharding and in micro-batches of any size. Without this
policy nothing is ever dropped. It has no loss: give it behind a policy that balances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from prismoe.errors import UsageError
from prismoe.train.routers import AllReduce, Change, Moment, Policy, Routed, Router

if TYPE_CHECKING:
    import torch

__all__ = ["Capacity", "attach", "within_capacity"]


def within_capacity(
    chosen_TK: torch.Tensor,
    *,
    group_T: torch.Tensor,
    num_experts: int,
    capacity: int,
    priority_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which assignments their expert can hold, bool [T, K].

    Within a group and expert the smallest `priority` comes first; without one, the order of the tokens.
    """
    import torch

    place = (group_T[:, None] * num_experts + chosen_TK).flatten()
    order = torch.arange(place.numel(), device=place.device)
    if priority_TK is not None:
        order = priority_TK.flatten().argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    sorted_place = place[order]
    rank = torch.arange(place.numel(), device=place.device) - torch.searchsorted(sorted_place, sorted_place)
    kept = torch.empty_like(rank, dtype=torch.bool)
    kept[order] = rank < capacity
    return kept.view_as(chosen_TK)


class Capacity(Policy):
    """The policy on a model."""

    def __init__(
        self,
        routers: Sequence[Router],
        all_reduce: AllReduce,
        *,
        factor: float,
        drop: Literal["position", "random"],
        group_tokens: int,
    ) -> None:
        import torch

        super().__init__(routers)
        self._all_reduce = all_reduce
        self._factor = factor
        self._random = drop == "random"
        self._group_tokens = group_tokens
        self._moment: Moment | None = None
        self._kept: list[torch.Tensor | None] = [None] * len(routers)
        self._counts = torch.zeros(2, dtype=torch.float64)  # assignments of this step: dropped, and all
        for layer, router in enumerate(routers):
            router.changes.append(self._change(layer))

    def begin(self, moment: Moment) -> None:
        size = self._group_tokens or moment.seq_len
        if len(moment.token_numbers_T) % size or int(moment.token_numbers_T[0]) % size:
            raise UsageError(
                f"groups of {size} tokens do not fill a micro-batch of {len(moment.token_numbers_T)}",
                where="pretrain.group_tokens",
                needed="a divisor of seq_len",
            )
        if not moment.continues(self._moment):
            self._counts.zero_()
        self._moment = moment

    def loss(self) -> torch.Tensor:
        import torch

        # Counted here and not in the forward pass, which may run twice (activation checkpointing).
        kept = [kept_TK for kept_TK in self._kept if kept_TK is not None]
        if kept:
            self._counts[0] += int(torch.stack([(~kept_TK).sum() for kept_TK in kept]).sum())
            self._counts[1] += sum(kept_TK.numel() for kept_TK in kept)
        return super().loss()

    def metrics(self) -> dict[str, float]:
        """`dropped`: share of the step's assignments, over all layers and processes."""
        if not self.routers:
            return {}
        lost, total = self._all_reduce(self._counts.to(self.routers[0].logits_TE.device))
        return {"dropped": float(lost / total)}

    def _change(self, layer: int) -> Change:
        import math

        import torch

        from prismoe.train.noise import uniform_bits

        def change(router: Router, hidden_TD: torch.Tensor, routed: Routed) -> Routed:
            moment = self._moment
            assert moment is not None, "begin comes before the forward pass"
            numbers_T = moment.token_numbers_T.to(hidden_TD.device)
            size = self._group_tokens or moment.seq_len
            priority_TK = None
            if self._random:
                bits_TE = uniform_bits(moment.seed, moment.step, layer, numbers_T, router.num_experts)
                priority_TK = bits_TE.gather(1, routed.chosen_TK)
            kept_TK = within_capacity(
                routed.chosen_TK,
                group_T=torch.div(numbers_T, size, rounding_mode="floor"),
                num_experts=router.num_experts,
                capacity=math.ceil(self._factor * size * routed.chosen_TK.shape[1] / router.num_experts),
                priority_TK=priority_TK,
            )
            self._kept[layer] = kept_TK
            return Routed(routed.logits_TE, routed.weights_TK * kept_TK, routed.chosen_TK)

        return change


def attach(
    routers: Sequence[Router],
    all_reduce: AllReduce,
    *,
    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
    drop: Literal["position", "random"] = "position",
    group_tokens: Annotated[int, Field(ge=0)] = 0,
) -> Capacity:
    """Let every expert take `factor` times its share of the tokens and no more."""
    return Capacity(routers, all_reduce, factor=factor, drop=drop, group_tokens=group_tokens)
