"""What a teacher says of the tokens of one micro-batch, and how far a student is from it.

Distillation after Hinton, Vinyals and Dean (arXiv 1503.02531, section 2): with z and t the logits of student and
teacher, q = softmax(z / T) and p = softmax(t / T), the divergence of a token is

    KL(p ‖ q) = Σ_v p_v (ln p_v - ln q_v)    in nats, and T² · KL(p ‖ q) is learned from: slope T (q - p).

T² keeps the slopes at one size whatever the temperature T (there: "the magnitudes of the gradients scale as 1/T²").
Where n words are compared one by one, they are those n that the teacher gives most, and all others together are one
more word (Σ of p, Σ of q over them): with S the n words, p* and q* the shares of the rest,

    KL = Σ_{v in S} p_v (ln p_v - ln q_v) + p* (ln p* - ln q*);    slope T (q_v - p_v) in S, T q_v (1 - p*/q*) outside.

It is never more than the whole divergence (log-sum inequality), and 0 where the student gives those words what the
teacher does. Probabilities are those over all words: renormalised over S instead, p would be too sure of itself and
what the student learns biased (arXiv 2503.16870, which shows it for pre-training).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["Lesson", "Top", "divergence", "divergence_top", "top_words"]


@dataclass(frozen=True)
class Top:
    """Of each of R tokens the teacher's n likeliest words [R, n], and ln p of each and of all others together [R, 1].

    ln p* may be -inf: the n words are all there is.
    """

    words_RN: torch.Tensor
    log_RN: torch.Tensor
    log_rest_R1: torch.Tensor

    def __getitem__(self, part: slice) -> Top:
        return Top(self.words_RN[part], self.log_RN[part], self.log_rest_R1[part])

    @classmethod
    def joined(cls, parts: Sequence[Top]) -> Top:
        """One after the other."""
        columns = ([part.words_RN for part in parts], [part.log_RN for part in parts], [p.log_rest_R1 for p in parts])
        return cls(*(torch.cat(column) for column in columns))


def top_words(logits_RV: torch.Tensor, num: int, *, temperature: float) -> Top:
    """The `num` likeliest words of each row, fewer than all; overwrites `logits_RV`."""
    logits_RV /= temperature
    log_sum_R1 = logits_RV.logsumexp(dim=1, keepdim=True)
    top_RN, words_RN = logits_RV.topk(num, dim=1)
    rest_R1 = logits_RV.scatter_(1, words_RN, -torch.inf).logsumexp(dim=1, keepdim=True)
    return Top(words_RN, top_RN - log_sum_R1, rest_R1 - log_sum_R1)


def divergence(
    logits_RV: torch.Tensor, teacher_RV: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of each row in nats [R], and the slope of T² · KL by the student's logits [R, V]; overwrites `teacher_RV`."""
    log_q_RV = logits_RV / temperature
    log_q_RV -= log_q_RV.logsumexp(dim=1, keepdim=True)
    log_p_RV = teacher_RV.div_(temperature)
    log_p_RV -= log_p_RV.logsumexp(dim=1, keepdim=True)
    p_RV = log_p_RV.exp()
    nats_R = log_p_RV.sub_(log_q_RV).mul_(p_RV).sum(dim=1)
    return nats_R, log_q_RV.exp_().sub_(p_RV).mul_(temperature)


def divergence_top(logits_RV: torch.Tensor, top: Top, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `divergence` from the teacher's likeliest words, all others as one."""
    words_RN, log_p_RN, log_p_R1 = top.words_RN, top.log_RN, top.log_rest_R1
    log_q_RV = logits_RV / temperature
    log_q_RV -= log_q_RV.logsumexp(dim=1, keepdim=True)
    log_q_RN = log_q_RV.gather(1, words_RN)
    log_q_R1 = log_q_RV.scatter(1, words_RN, -torch.inf).logsumexp(dim=1, keepdim=True)
    nats_R = (log_p_RN.exp() * (log_p_RN - log_q_RN)).sum(dim=1)
    more_R1 = log_p_R1 - log_q_R1
    nats_R += (log_p_R1.exp() * more_R1).nan_to_num_(0.0)[:, 0]  # 0 · ∞ where there are no others
    slopes_RV = log_q_RV.exp().sub_(log_q_RV.add_(more_R1).exp_())
    slopes_RV.scatter_(1, words_RN, log_q_RN.exp() - log_p_RN.exp())
    return nats_R, slopes_RV.mul_(temperature)


@dataclass
class Lesson:
    """The teacher's word on T tokens, and what a student's loss makes of it.

    Attributes:
        said: the teacher's likeliest words, or its logits for a slice of the tokens, in float32: a tensor of its own.
        text_weight, weight: of the loss of the text and of T² · KL.
        nats: KL of the tokens that counted, in the parts in which it was computed.
    """

    said: Top | Callable[[slice], torch.Tensor]
    text_weight: float
    weight: float
    temperature: float
    nats: list[torch.Tensor] = field(default_factory=list)

    def slopes(self, part: slice, logits_RV: torch.Tensor, counted_R: torch.Tensor) -> torch.Tensor:
        """The slope of `weight` · T² · KL of the tokens `part` by their logits, those not `counted_R` as well."""
        if isinstance(self.said, Top):
            nats_R, slopes_RV = divergence_top(logits_RV, self.said[part], temperature=self.temperature)
        else:
            teacher_RV = self.said(part).to(logits_RV.dtype)
            nats_R, slopes_RV = divergence(logits_RV, teacher_RV, temperature=self.temperature)
        self.nats.append(nats_R.where(counted_R, 0.0))
        return slopes_RV.mul_(self.weight)

    def loss(self, logits_RV: torch.Tensor, counted_R: torch.Tensor, slope: float) -> torch.Tensor:
        """`slope` · `weight` · T² · KL, summed over the tokens that are counted, with a graph."""
        loss: torch.Tensor = _Taught.apply(logits_RV, counted_R, slope, self)  # type: ignore[no-untyped-call]
        return loss

    def total(self) -> torch.Tensor:
        """KL summed over the tokens that counted, in float64."""
        return torch.stack([nats_R.double().sum() for nats_R in self.nats]).sum()

    def worth(self) -> torch.Tensor:
        """`weight` · T² · KL, summed over the tokens that counted."""
        return self.weight * self.temperature**2 * self.total()


class _Taught(torch.autograd.Function):
    """What `Lesson.loss` says; its gradient is made in the forward pass, where the logits are."""

    @staticmethod
    def forward(
        context: Any, logits_RV: torch.Tensor, counted_R: torch.Tensor, slope: float, lesson: Lesson
    ) -> torch.Tensor:
        wide = torch.promote_types(logits_RV.dtype, torch.float32)
        slopes_RV = lesson.slopes(slice(0, len(logits_RV)), logits_RV.detach().to(wide), counted_R)
        context.slopes = slopes_RV.mul_(counted_R[:, None]).mul_(slope)
        context.dtype = logits_RV.dtype
        return (slope * lesson.worth()).to(wide)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slopes, context.slopes = context.slopes, None
        assert slopes is not None, "a second backward pass"
        return slopes.mul_(gradient).to(context.dtype), None, None, None
