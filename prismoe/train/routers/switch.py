"""Switch load-balance loss (Fedus et al. 2021, section 2.2, equations 4-6), extended from top-1 to top-K.

Per layer: E · Σ_e f_e · P_e, where f_e is the share of the T·K assignments that went to expert e (no gradient)
and P_e the mean router probability of e. It is 1 when routing is balanced, E when one expert takes all.
Layers are summed, as in the paper; `coefficient` is the paper's α.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prismoe.train.routers import Router

if TYPE_CHECKING:
    import torch

Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]

__all__ = ["Switch", "attach", "balance"]


def balance(logits_TE: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """The balance term of one layer, a scalar in float32, differentiable through the probabilities."""
    import torch

    num_experts = logits_TE.shape[-1]
    share_E = torch.bincount(chosen_TK.reshape(-1), minlength=num_experts).float() / chosen_TK.numel()
    probability_E = torch.softmax(logits_TE.float(), dim=-1).mean(dim=0)
    return num_experts * (share_E * probability_E).sum()


class Switch:
    """The policy on a model: reads what the routers said in the latest forward pass."""

    def __init__(self, routers: Sequence[Router], *, coefficient: float) -> None:
        self._routers = routers
        self._coefficient = coefficient

    def loss(self) -> torch.Tensor:
        import torch

        terms = [balance(router.logits_TE, router.chosen_TK) for router in self._routers]
        return self._coefficient * torch.stack(terms).sum()

    def detach(self) -> None:
        """Nothing to undo: this policy only reads."""


def attach(
    routers: Sequence[Router], *, coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2
) -> Switch:
    """Balance the load of every router with weight `coefficient`."""
    return Switch(routers, coefficient=coefficient)
