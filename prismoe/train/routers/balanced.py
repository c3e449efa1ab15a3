"""Forced balance, for benchmarks: tokens take the experts in turn, whatever the router says.

Token number n of the step gets experts n·K, …, n·K + K-1 modulo E, weighted by the rule of the model's class from its
real logits: the work is that of a perfectly balanced router, and gradients flow. What comes out is no useful model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prismoe.train.routers import AllReduce, Moment, Policy, Routed, Router

if TYPE_CHECKING:
    import torch

__all__ = ["Balanced", "attach"]


class Balanced(Policy):
    """The policy on a model."""

    def __init__(self, routers: Sequence[Router]) -> None:
        from prismoe.train.weighting import weighting

        super().__init__(routers)
        self._moment: Moment | None = None
        self._rules = {id(router): weighting(router) for router in routers}
        for router in routers:
            router.changes.append(self._change)

    def begin(self, moment: Moment) -> None:
        self._moment = moment

    def _change(self, router: Router, hidden_TD: torch.Tensor, routed: Routed) -> Routed:
        import torch

        from prismoe.train.weighting import reroute

        assert self._moment is not None, "begin comes before the forward pass"
        numbers_T = self._moment.token_numbers_T.to(hidden_TD.device)
        turns_K = torch.arange(router.top_k, device=hidden_TD.device)
        chosen_TK = (numbers_T[:, None] * router.top_k + turns_K) % router.num_experts
        return reroute(self._rules[id(router)], routed, chosen_TK, routed.logits_TE)


def attach(routers: Sequence[Router], all_reduce: AllReduce) -> Balanced:
    """Send every expert the same number of tokens."""
    return Balanced(routers)
