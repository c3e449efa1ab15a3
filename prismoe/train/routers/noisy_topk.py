"""Noisy top-K routing with importance and load losses (Shazeer et al. 2017, section 2.1 and appendix A).

Noisy logits are x·W_g + ε·σ with σ = softplus(x·W_n) + 0.01 (the floor is in the authors' code) and ε standard normal:
they decide which experts are kept and how they are weighted, by the rule of the model's class. The loss of a layer is
coefficient · (CV²(importance) + CV²(load)); importance_e sums the weights of expert e over the tokens of all ranks, and
load_e sums Φ((clean logit - threshold) / σ), the probability that e would be kept if its noise were drawn again: the
threshold is the (K+1)-th noisy logit for an expert that is kept and the K-th for one that is not. CV² is the unbiased
variance over the squared mean. Layers are summed, as in LLaMA-MoE (weight 1e-2).

W_n starts at zero as there: σ = ln 2 + 0.01 = 0.7031 everywhere. ε is a hash of the token's place (see `noise`). With
`compat` an expert counts as kept when its noise alone, ε·σ, is above the threshold: so does the published code
of LLaMA-MoE, whose loads are therefore those of other experts than the chosen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prismoe.errors import UsageError
from prismoe.train.routers import AllReduce, Change, Moment, Policy, Routed, Router

if TYPE_CHECKING:
    import torch

__all__ = ["NoisyTopK", "attach", "balance_terms", "load_probabilities"]

_FLOOR = 1e-2


def load_probabilities(
    clean_TE: torch.Tensor, noise_TE: torch.Tensor, sigma_TE: torch.Tensor, *, top_k: int, compat: bool = False
) -> torch.Tensor:
    """P(expert is kept | noise of the others) [T, E]; `noise` is ε·σ. Needs top_k < E."""
    noisy_TE = clean_TE + noise_TE
    top_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    return _kept_probabilities(clean_TE, noise_TE, sigma_TE, noisy_TE, top_TK, compat=compat)


def _kept_probabilities(
    clean_TE: torch.Tensor,
    noise_TE: torch.Tensor,
    sigma_TE: torch.Tensor,
    noisy_TE: torch.Tensor,
    top_TK: torch.Tensor,
    *,
    compat: bool,
) -> torch.Tensor:
    """The same, where the K+1 greatest noisy logits are known."""
    import torch

    when_in_T1, when_out_T1 = top_TK[:, -1:], top_TK[:, -2:-1]
    kept_TE = (noise_TE if compat else noisy_TE) > when_in_T1
    threshold_TE = torch.where(kept_TE, when_in_T1, when_out_T1)
    probability_TE: torch.Tensor = torch.special.ndtr((clean_TE - threshold_TE) / sigma_TE)
    return probability_TE


def balance_terms(sums_LE: torch.Tensor) -> torch.Tensor:
    """CV² of each row [L]: unbiased variance over squared mean."""
    return sums_LE.var(dim=-1) / (sums_LE.mean(dim=-1).square() + 1e-10)


class NoisyTopK(Policy):
    """The policy on a model; the noise weights are its parameters."""

    def __init__(self, routers: Sequence[Router], all_reduce: AllReduce, *, coefficient: float, compat: bool) -> None:
        import torch

        from prismoe.train.weighting import router_weight, weighting

        super().__init__(routers)
        self._all_reduce = all_reduce
        self._coefficient = coefficient
        self._compat = compat
        self._moment: Moment | None = None
        self._rules = [weighting(router) for router in routers]
        self._noise_ED: list[torch.nn.Parameter] = []
        self._sums: list[torch.Tensor | None] = [None] * len(routers)
        self._terms: torch.Tensor | None = None
        for layer, (router, rule) in enumerate(zip(routers, self._rules, strict=True)):
            if rule.bias_E is not None and bool(rule.bias_E.any()):
                raise UsageError(
                    "its selection bias is not zero",
                    where=router.name,
                    needed="a router that keeps the greatest logits",
                    hint="noise cannot be added to biased scores; use bias_balanced",
                )
            weight = router_weight(router)
            zeros = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            self._noise_ED.append(torch.nn.Parameter(zeros))
            router.changes.append(self._change(layer))

    def begin(self, moment: Moment) -> None:
        self._moment = moment

    def loss(self) -> torch.Tensor:
        import torch

        if not self.routers:
            return super().loss()
        # One collective for the importance and load of all layers [L, 2, E].
        sums = self._all_reduce(torch.stack([part for part in self._sums if part is not None]))
        importance_L, load_L = balance_terms(sums[:, 0]), balance_terms(sums[:, 1])
        # Numbers for the log stay where they are until somebody asks: a device would be waited for at each micro-batch.
        self._terms = torch.stack([importance_L.detach().sum(), load_L.detach().sum()])
        return self._coefficient * (importance_L + load_L).sum()

    def metrics(self) -> dict[str, float]:
        importance, load = (0.0, 0.0) if self._terms is None else self._terms.tolist()
        return {"importance_cv2": importance, "load_cv2": load}

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {f"{router.name}.noise": weight for router, weight in zip(self.routers, self._noise_ED, strict=True)}

    def _change(self, layer: int) -> Change:
        import torch
        import torch.nn.functional as F

        from prismoe.train.noise import normal
        from prismoe.train.weighting import at_least_float32

        rule = self._rules[layer]

        def change(router: Router, hidden_TD: torch.Tensor, routed: Routed) -> Routed:
            moment = self._moment
            assert moment is not None, "begin comes before the forward pass"
            clean_TE = at_least_float32(routed.logits_TE)
            raw_TE = F.linear(hidden_TD, self._noise_ED[layer].to(hidden_TD.dtype))
            sigma_TE = F.softplus(at_least_float32(raw_TE)) + _FLOOR
            numbers_T = moment.token_numbers_T.to(clean_TE.device)
            noise_TE = normal(moment.seed, moment.step, layer, numbers_T, router.num_experts) * sigma_TE
            noisy_TE = clean_TE + noise_TE
            # One search serves the choice and the thresholds of the load, one softmax the experts and the importance.
            top_TK, order_TK = noisy_TE.topk(min(router.top_k + 1, router.num_experts), dim=-1)
            chosen_TK = order_TK[:, : router.top_k].contiguous()
            weights_TK = rule.weights(noisy_TE, chosen_TK)
            importance_E = torch.zeros_like(clean_TE[0]).index_add(0, chosen_TK.flatten(), weights_TK.flatten())
            if router.top_k < router.num_experts:
                load_E = _kept_probabilities(clean_TE, noise_TE, sigma_TE, noisy_TE, top_TK, compat=self._compat).sum(
                    dim=0
                )
            else:
                load_E = torch.full_like(importance_E, len(clean_TE))
            self._sums[layer] = torch.stack([importance_E, load_E])
            return Routed(noisy_TE, weights_TK.to(routed.weights_TK.dtype), chosen_TK)

        return change


def attach(
    routers: Sequence[Router],
    all_reduce: AllReduce,
    *,
    coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2,
    compat: bool = False,
) -> NoisyTopK:
    """Route by noisy logits and balance importance and load with weight `coefficient`."""
    return NoisyTopK(routers, all_reduce, coefficient=coefficient, compat=compat)
