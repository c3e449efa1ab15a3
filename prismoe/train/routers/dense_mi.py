"""All experts on at first, K of them at last (dense training of DS-MoE, Pan et al. 2024, arXiv 2404.05567).

Up to step a of `anneal` [a, b] every token goes through all E experts, each with the weight w under which they are the
dense FFN together (see `train.allon`): a partition starts at the dense model's loss, whatever its routers. From a to b
the experts on, J, go from E to K in a straight line, a part of an expert at a time: the last of the ⌈J⌉ greatest counts
J - ⌈J⌉ + 1. Their weights go from w to those of the model's class over the J, and r from 1 to 0,

    weight_e = r · w + (1 - r) · class_e(J).

From step b on this is the model's own routing, and a run has to get there. In evaluation the stock router speaks all
the time, so held-out losses start high and end where the training loss does. Backward, r · w counts as if it were the
class's weight at equal scores: the router learns from all J experts while the loss does not depend on it yet.

The loss of a layer is - `coefficient` · I(token; expert) = coefficient · (mean H(expert | token) - H(mean)), with the
router's probabilities (scores over their sum) and H in nats, the means over the tokens of all ranks: tokens decide, and
all experts are used. Layers are summed. Published weights are 2e-4 to 6e-4; the paper trains with all experts on to
the end and cuts them off only in inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prismoe.errors import UsageError
from prismoe.train.routers import AllReduce, Change, Moment, Policy, Routed, Router

if TYPE_CHECKING:
    import torch

__all__ = ["DenseMI", "attach", "check_steps", "experts_of_run", "experts_on"]


def experts_on(step: int, *, anneal: tuple[int, int], num_experts: int, top_k: int) -> tuple[int, float]:
    """How many experts a token is sent to at `step`, and what part of the last of them counts."""
    first, last = anneal
    whole, left = last - first, min(max(last - step, 0), last - first)
    above = (num_experts - top_k) * left
    more = -(-above // whole)
    return top_k + more, 1.0 - (more * whole - above) / whole


class DenseMI(Policy):
    """The policy on a model."""

    def __init__(
        self, routers: Sequence[Router], all_reduce: AllReduce, *, coefficient: float, anneal: tuple[int, int]
    ) -> None:
        from prismoe.train.weighting import weighting

        super().__init__(routers)
        if not 0 <= anneal[0] < anneal[1]:
            raise UsageError(f"{list(anneal)}", where="pretrain.anneal", needed="two steps, the earlier one first")
        self._all_reduce = all_reduce
        self._coefficient = coefficient
        self._anneal = anneal
        self._step = 0
        self._rules = [weighting(router) for router in routers]
        self._information: torch.Tensor | None = None  # of the latest micro-batch [L]
        for layer, router in enumerate(routers):
            router.changes.append(self._change(layer))

    def begin(self, moment: Moment) -> None:
        self._step = moment.step

    def loss(self) -> torch.Tensor:
        import torch

        if not self.routers:
            return super().loss()
        sums = []  # of each layer: probabilities, entropies, tokens [E + 2]
        for rule, router in zip(self._rules, self.routers, strict=True):
            scores_TE = rule.scores(router.logits_TE)
            share_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
            entropy = _entropy(share_TE).sum()
            sums.append(torch.cat([share_TE.sum(dim=0), entropy[None], entropy.new_tensor([len(share_TE)])]))
        whole = self._all_reduce(torch.stack(sums))
        mean_LE, conditional_L = whole[:, :-2] / whole[:, -1:], whole[:, -2] / whole[:, -1]
        information_L = _entropy(mean_LE) - conditional_L
        self._information = information_L.detach()
        loss: torch.Tensor = -self._coefficient * information_L.sum()
        return loss

    def metrics(self) -> dict[str, float]:
        """`experts_on` of a token; `share_dense`: r; `layers_not_dense`: how many do not start as the dense FFN, or
        nothing is known of; `information`: the mean over the layers, in nats."""
        if self._information is None:
            return {}
        router = self.routers[0]
        count, part = self._on(router)
        unknown = [one for one in self.routers if one.all_on is None or not one.all_on.exact]
        return {
            "experts_on": count - 1 + part,
            "share_dense": self._share(),
            "layers_not_dense": float(len(unknown)),
            "information": float(self._information.mean()),
        }

    def _on(self, router: Router) -> tuple[int, float]:
        return experts_on(self._step, anneal=self._anneal, num_experts=router.num_experts, top_k=router.top_k)

    def _share(self) -> float:
        first, last = self._anneal
        return min(1.0, max(0.0, (last - self._step) / (last - first)))

    def _change(self, layer: int) -> Change:
        import torch

        rule = self._rules[layer]

        def change(router: Router, hidden_TD: torch.Tensor, routed: Routed) -> Routed:
            count, part = self._on(router)
            chosen_TK = rule.choose(routed.logits_TE, count)
            parts_K = torch.ones(count, device=chosen_TK.device)
            parts_K[-1] = part
            class_TK = rule.weights(routed.logits_TE, chosen_TK, parts_K)
            equal, share = rule.factor / router.num_experts, self._share()  # the class's weight at equal scores
            weight = equal if router.all_on is None else router.all_on.weight
            slope = share * weight / equal + (1.0 - share)
            value_TK = share * weight * parts_K + (1.0 - share) * class_TK.detach()
            weights_TK = value_TK + slope * (class_TK - class_TK.detach())
            return Routed(routed.logits_TE, weights_TK.to(routed.weights_TK.dtype), chosen_TK)

        return change


def _entropy(shares: torch.Tensor) -> torch.Tensor:
    """In nats, over the last axis. The derivative of p·log p is infinite at 0; there it is that of the least number."""
    import torch

    entropy: torch.Tensor = -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum(dim=-1)
    return entropy


def check_steps(steps: int, *, anneal: tuple[int, int], **others: float) -> None:
    """Raises UsageError where the last of `steps` steps is not yet with the model's own routing."""
    if anneal[1] >= steps:
        raise UsageError(
            f"experts are on until step {anneal[1]} of {steps}",
            where="pretrain.anneal",
            needed="an end before the last step: the saved model keeps its top_k",
            hint=f"anneal: [0, {steps // 2}]",
        )


def experts_of_run(
    steps: int, *, num_experts: int, top_k: int, anneal: tuple[int, int], **others: float
) -> tuple[int, float]:
    """All of them at most; on average those of the straight line (a fraction is computed as a whole expert)."""
    counts = [
        experts_on(step, anneal=anneal, num_experts=num_experts, top_k=top_k)[0]
        for step in range(0, steps, max(1, steps // 1000))
    ]
    return max(counts), sum(counts) / len(counts)


def attach(
    routers: Sequence[Router],
    all_reduce: AllReduce,
    *,
    coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 4e-4,
    anneal: tuple[int, int] = (0, 500),
) -> DenseMI:
    """Begin with all experts on, and keep fewer and fewer from step to step of `anneal`."""
    return DenseMI(routers, all_reduce, coefficient=coefficient, anneal=anneal)
