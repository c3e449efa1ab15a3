"""Sampled experts with a gradient of third order (SparseMixer-v2 of GRIN, Liu et al. 2024, arXiv 2409.12136).

For long runs: in the authors' control it is behind ordinary routing at first and ahead of it only after half a trillion
tokens. Recovering a converted model is not what it is for.

In training the K experts of a token are drawn one after the other, without replacement. Draw k knows the logits z of
the experts that are left, m the greatest of them; those with (m - z) / max(|z|, m) > 2 · `jitter` are out, and one of
the others is taken with probability π_k, their softmax. It is weighted as the model's class weighs the K experts that
were drawn, times a factor h: 1 if it has logit m, else 1 with probability 1/4 and 1/3 with probability 3/4. Backward,
weight k sends ∂w/∂z = w · ∂ log π_k(drawn)/∂z, w without the factor: times the loss's derivative by the weight this is
[f(w) - f(0)] ∂ log π_k, the gradient of the discrete choice, where the difference is taken by Heun's rule with nodes
w/3 and w, exact for cubic f. In evaluation the stock router speaks: the K greatest logits, which are the likeliest.

The published weights are π_k(drawn) themselves, and two of them add up to anything below 2; a stock class knows nothing
of that, hence its own here (the same with K = 1, a large jitter and softmax weights that are not renormalised). The
paper has K of 1 and 2; more are drawn in the same way. Draws are a hash of the token's place (see `noise`). It does
not balance: give it beside `switch`, whose shares are of the whole global batch, as the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from prismoe.errors import UsageError
from prismoe.train.routers import AllReduce, Change, Moment, Policy, Routed, Router

if TYPE_CHECKING:
    import torch

__all__ = ["Drawn", "SparseMixer2", "attach", "draw"]


@dataclass(frozen=True, eq=False)
class Drawn:
    """K draws for each token, each of them [T, K]: the experts, log π_k of each (differentiable), whether it was the
    one with the greatest logit left, and from how many it was taken."""

    chosen_TK: torch.Tensor
    log_TK: torch.Tensor
    greatest_TK: torch.Tensor
    candidates_TK: torch.Tensor


def draw(logits_TE: torch.Tensor, uniform_TKE: torch.Tensor, *, jitter: float) -> Drawn:
    """K experts of each token, by K · E numbers in (0, 1)."""
    import torch

    left_TE, found = logits_TE, []
    for uniform_TE in uniform_TKE.unbind(dim=1):
        with torch.no_grad():
            most_T1, first_T1 = left_TE.max(dim=-1, keepdim=True)
            out_TE = most_T1 - left_TE > 2 * jitter * torch.maximum(logits_TE.abs(), most_T1)
            gumbel_TE = -torch.log(-torch.log(uniform_TE)).to(logits_TE.dtype)
            drawn_T1 = (left_TE + gumbel_TE).masked_fill(out_TE, -torch.inf).argmax(dim=-1, keepdim=True)
        log_TE = torch.log_softmax(left_TE.masked_fill(out_TE, -torch.inf), dim=-1)
        greatest_T1, candidates_T1 = drawn_T1 == first_T1, (~out_TE).sum(dim=-1, keepdim=True)
        found.append((drawn_T1, log_TE.gather(1, drawn_T1), greatest_T1, candidates_T1))
        left_TE = left_TE.scatter(1, drawn_T1, -torch.inf)
    return Drawn(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))


class SparseMixer2(Policy):
    """The policy on a model."""

    def __init__(self, routers: Sequence[Router], all_reduce: AllReduce, *, jitter: float) -> None:
        from prismoe.train.weighting import weighting

        super().__init__(routers)
        self._all_reduce = all_reduce
        self._jitter = jitter
        self._moment: Moment | None = None
        self._rules = [weighting(router) for router in routers]
        self._latest: list[torch.Tensor | None] = [None] * len(routers)
        self._counts: torch.Tensor | None = None  # of this step: draws of another than the greatest, candidates, draws
        for layer, (router, rule) in enumerate(zip(routers, self._rules, strict=True)):
            if rule.bias_E is not None and bool(rule.bias_E.any()):
                raise UsageError(
                    "its selection bias is not zero",
                    where=router.name,
                    needed="a router that keeps the greatest logits",
                    hint="experts are drawn by their logits alone; use bias_balanced",
                )
            router.estimated = True
            router.changes.append(self._change(layer))

    def begin(self, moment: Moment) -> None:
        if not moment.continues(self._moment):  # the last step may have been left out
            self._counts = None
        self._moment = moment

    def loss(self) -> torch.Tensor:
        import torch

        # Counted here and not in the forward pass, which may run twice (activation checkpointing).
        latest = [counts for counts in self._latest if counts is not None]
        if latest:
            counts = torch.stack(latest).sum(dim=0)
            self._counts = counts if self._counts is None else self._counts + counts
        return super().loss()

    def metrics(self) -> dict[str, float]:
        """`explored`: share of the step's draws that took another expert than the one of the greatest logit left;
        `candidates`: from how many experts a draw chose, on average. Over all layers and processes."""
        if self._counts is None:
            return {}
        explored, candidates, draws = self._all_reduce(self._counts.double()).tolist()
        return {"explored": explored / draws, "candidates": candidates / draws}

    def detach(self) -> None:
        super().detach()
        for router in self.routers:
            router.estimated = False

    def _change(self, layer: int) -> Change:
        import torch

        from prismoe.train.noise import uniform
        from prismoe.train.weighting import at_least_float32

        rule = self._rules[layer]

        def change(router: Router, hidden_TD: torch.Tensor, routed: Routed) -> Routed:
            moment = self._moment
            assert moment is not None, "begin comes before the forward pass"
            logits_TE = at_least_float32(routed.logits_TE)
            numbers_T = moment.token_numbers_T.to(logits_TE.device)
            count, each = router.num_experts, router.num_experts + 1
            # The first E columns are of the draws of other policies.
            columns = count + router.top_k * each
            numbers = uniform(moment.seed, moment.step, layer, numbers_T, columns)[:, count:]
            numbers = numbers.reshape(-1, router.top_k, each)
            drawn = draw(logits_TE, numbers[..., :count], jitter=self._jitter)
            with torch.no_grad():
                weights_TK = rule.weights(logits_TE, drawn.chosen_TK)
                whole_TK = drawn.greatest_TK | (numbers[..., count] > 0.75)
                factor_TK = torch.where(whole_TK, 1.0, 1.0 / 3.0).to(weights_TK.dtype)
                counts = [(~drawn.greatest_TK).sum(), drawn.candidates_TK.sum()]
                self._latest[layer] = torch.stack([*counts, counts[0].new_tensor(whole_TK.numel())])
            # Its value is weights · factor, its derivative by log π the weights alone.
            estimated_TK = weights_TK * (factor_TK + (drawn.log_TK - drawn.log_TK.detach()))
            return Routed(routed.logits_TE, estimated_TK.to(routed.weights_TK.dtype), drawn.chosen_TK)

        return change


def attach(
    routers: Sequence[Router],
    all_reduce: AllReduce,
    *,
    jitter: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01,
) -> SparseMixer2:
    """Draw the experts of each token among those whose logit is within 2 · `jitter` of the greatest (0: no choice, and
    no gradient for a router)."""
    return SparseMixer2(routers, all_reduce, jitter=jitter)
