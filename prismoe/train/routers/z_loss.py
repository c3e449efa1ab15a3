"""Router z-loss (ST-MoE, Zoph et al. 2022, equation 5): keeps logits small, for it is large logits that round badly.

Per layer the mean over the tokens of all ranks of (log Σ_e exp(logit_e))², on the raw logits in float32. Layers are
summed; the paper's weight is 1e-3. It does not balance: give it beside a policy that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prismoe.train.routers import AllReduce, Policy, Router

if TYPE_CHECKING:
    import torch

__all__ = ["ZLoss", "attach"]


class ZLoss(Policy):
    """The policy on a model: reads what the routers said in the latest forward pass."""

    def __init__(self, routers: Sequence[Router], all_reduce: AllReduce, *, coefficient: float) -> None:
        super().__init__(routers)
        self._all_reduce = all_reduce
        self._coefficient = coefficient
        self._value = 0.0

    def loss(self) -> torch.Tensor:
        import torch

        from prismoe.train.weighting import at_least_float32

        if not self.routers:
            return super().loss()
        wide = [at_least_float32(router.logits_TE) for router in self.routers]
        squares_L = torch.stack([torch.logsumexp(one_TE, dim=-1).square().sum() for one_TE in wide])
        sums = self._all_reduce(torch.cat([squares_L, squares_L.new_tensor([len(wide[0])])]))
        value: torch.Tensor = (sums[:-1] / sums[-1]).sum()
        self._value = float(value.detach())
        return self._coefficient * value

    def metrics(self) -> dict[str, float]:
        return {"z_loss": self._value}


def attach(
    routers: Sequence[Router],
    all_reduce: AllReduce,
    *,
    coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3,
) -> ZLoss:
    """Keep router logits small with weight `coefficient`."""
    return ZLoss(routers, all_reduce, coefficient=coefficient)
