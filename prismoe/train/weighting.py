"""How stock routers turn logits into weights: a policy that routes differently must weigh as the model's class does.

Every router of our targets is a linear map, scores (softmax over all experts, or sigmoid of each), K kept experts and
their weights: the scores themselves or divided by their sum (softmax before top-k and renormalised is softmax after
top-k), times a factor. Some classes have a slot for a bias that counts in the choice and not in the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prismoe.errors import UsageError
from prismoe.train.routers import Routed, Router

__all__ = ["Weighting", "at_least_float32", "reroute", "router_weight", "weighting"]


@dataclass(frozen=True, eq=False)
class Weighting:
    """The rule of one stock router. `bias_E` is the model's own selection bias, where its class has one."""

    sigmoid: bool
    renormalised: bool
    factor: float
    bias_E: torch.Tensor | None

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Scores of all experts [T, E], in at least float32."""
        wide_TE = at_least_float32(logits_TE)
        return torch.sigmoid(wide_TE) if self.sigmoid else torch.softmax(wide_TE, dim=-1)

    def weights(
        self, logits_TE: torch.Tensor, chosen_TK: torch.Tensor, parts_K: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weights of the `chosen` experts [T, K], in at least float32; with `parts` only those of the scores count."""
        kept_TK = self.scores(logits_TE).gather(1, chosen_TK)
        if parts_K is not None:
            kept_TK = kept_TK * parts_K.to(kept_TK.dtype)
        if self.renormalised:
            # The sum underflows where every kept logit is far below the greatest; that is how the stock class has it.
            kept_TK = kept_TK / kept_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(kept_TK.dtype).tiny)
        return kept_TK * self.factor

    def choose(self, logits_TE: torch.Tensor, top_k: int, extra_E: torch.Tensor | None = None) -> torch.Tensor:
        """The K experts of the greatest score plus bias (the model's own and `extra_E`) [T, K]."""
        biases = [bias.reshape(-1) for bias in (self.bias_E, extra_E) if bias is not None]
        ranked_TE = sum(biases, self.scores(logits_TE)) if biases else logits_TE
        return ranked_TE.topk(top_k, dim=-1).indices


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32; float64 stays, so that gradients can be checked in it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def weighting(router: Router) -> Weighting:
    """The rule by which the stock class of `router` weighs, read from its attributes.

    Raises:
        UsageError: it chooses among groups of experts first: no policy here routes like that.
    """
    module = router.module
    groups = getattr(module, "num_group", 1)
    if groups > 1:
        raise UsageError(f"{groups} groups of experts", where=router.name, needed="n_group 1")
    function = getattr(module, "expert_selection_fn", None)  # Cohere2
    sigmoid = function == "sigmoid" or hasattr(module, "routed_scaling_factor")
    # Routers without the flag divide by the sum; so does Cohere2's softmax, whatever its flag says.
    renormalised = function == "softmax" or bool(getattr(module, "norm_topk_prob", True))
    slot = getattr(module, "moe_statics", module)
    bias_E = getattr(slot, "e_score_correction_bias", None)
    return Weighting(sigmoid, renormalised, float(getattr(module, "routed_scaling_factor", 1.0)), bias_E)


def reroute(rule: Weighting, routed: Routed, chosen_TK: torch.Tensor, logits_TE: torch.Tensor) -> Routed:
    """`routed` with other experts and logits, weighed by the model's rule in the dtype the experts expect."""
    return Routed(logits_TE, rule.weights(logits_TE, chosen_TK).to(routed.weights_TK.dtype), chosen_TK)


def router_weight(router: Router) -> torch.nn.Parameter:
    """The router's matrix [E, D]."""
    return next(parameter for parameter in router.module.parameters() if parameter.shape[-1:] != (router.num_experts,))
