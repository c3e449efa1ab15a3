"""Switch load-balance loss (Fedus et al. 2021, section 2.2, equations 4-6), extended from top-1 to top-K.

Per layer: E · Σ_e f_e · P_e, where f_e is the share of the T·K assignments that went to expert e (no gradient)
and P_e the mean router probability of e, both over the tokens of all ranks. It is 1 when routing is balanced, E when
one expert takes all. Layers are summed, as in the paper; `coefficient` is the paper's α.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prismoe.train.routers import AllReduce, Policy, Router, identity

if TYPE_CHECKING:
    import torch

Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]

__all__ = ["Switch", "attach", "balance"]


def balance(logits_TE: torch.Tensor, chosen_TK: torch.Tensor, all_reduce: AllReduce = identity) -> torch.Tensor:
    """The balance term of one layer, a scalar, differentiable through the probabilities; sums in at least float32."""
    term: torch.Tensor = _terms(all_reduce(_sums(logits_TE, chosen_TK))[None])[0]
    return term


def _sums(logits_TE: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """Assignments and summed probabilities of each expert, one after the other [2E]: what is additive over tokens."""
    import torch

    from prismoe.train.weighting import at_least_float32

    wide_TE = at_least_float32(logits_TE)
    count_E = torch.bincount(chosen_TK.reshape(-1), minlength=logits_TE.shape[-1]).to(wide_TE.dtype)
    return torch.cat([count_E, torch.softmax(wide_TE, dim=-1).sum(dim=0)])


def _terms(sums: torch.Tensor) -> torch.Tensor:
    """The balance term of each layer [L] from the sums of all tokens [L, 2E]."""
    count_LE, probability_LE = sums.chunk(2, dim=1)
    share_LE = count_LE / count_LE.sum(dim=1, keepdim=True)
    mean_LE = probability_LE / probability_LE.sum(dim=1, keepdim=True).detach()
    return share_LE.shape[1] * (share_LE * mean_LE).sum(dim=1)


class Switch(Policy):
    """The policy on a model: reads what the routers said in the latest forward pass."""

    def __init__(self, routers: Sequence[Router], all_reduce: AllReduce, *, coefficient: float) -> None:
        super().__init__(routers)
        self._all_reduce = all_reduce
        self._coefficient = coefficient

    def loss(self) -> torch.Tensor:
        import torch

        if not self.routers:
            return super().loss()
        # One collective for all layers.
        sums = torch.stack([_sums(router.logits_TE, router.chosen_TK) for router in self.routers])
        return self._coefficient * _terms(self._all_reduce(sums)).sum()


def attach(
    routers: Sequence[Router],
    all_reduce: AllReduce,
    *,
    coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2,
) -> Switch:
    """Balance the load of every router with weight `coefficient`."""
    return Switch(routers, all_reduce, coefficient=coefficient)
