"""The loss of every token, without the logits of all of them at a time where these are many (see `logits`).

A stock class is run as it is, but its output matrix says the loss instead of logits: for some rows after the other,
logits, loss and their gradients, which are added up there and then (as in "fused linear cross-entropy"). The gradient
is exact: the loss is linear in what a token is worth, and that is known before the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from prismoe.train.lesson import Lesson
from prismoe.train.logits import rows_at_once

__all__ = ["head_factor", "in_place_of", "product_dtype", "text_loss", "token_losses"]

IGNORED = -100


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Loss in nats of token t+1 given the logits at t, [B, T-1] in float32; 0 where the label is -100."""
    flat = F.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels_BT.shape[0], -1)


def text_loss(
    model: Any,
    ids_BT: torch.Tensor,
    labels_BT: torch.Tensor,
    *,
    num_tokens: float,
    lesson: Lesson | None = None,
    **inputs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of a stock causal LM over `num_tokens`, and that of each token as in `token_losses`, detached.

    With a `lesson` on these tokens the first is the weighted sum of text and teacher; the second stays the text's, and
    the lesson knows its own. `inputs` are further arguments of the model. Only the first result has a graph.
    """
    head = model.get_output_embeddings()
    rows = rows_at_once(ids_BT.numel(), head.weight.shape[0])
    factor = head_factor(model) if rows and type(head) is torch.nn.Linear else None
    next_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    if factor is None:
        logits_BTV = model(input_ids=ids_BT, use_cache=False, **inputs).logits
        loss_BT = token_losses(logits_BTV, labels_BT)
        total = loss_BT.sum() / num_tokens
        if lesson is not None:
            counted_T = (next_BT != IGNORED).flatten()
            total = lesson.text_weight * total + lesson.loss(logits_BTV.flatten(0, 1), counted_T, 1.0 / num_tokens)
        return total, loss_BT.detach()
    found: list[torch.Tensor] = []

    def loss_of(hidden_BTD: torch.Tensor) -> torch.Tensor:
        total, loss_T = _LossInParts.apply(  # type: ignore[no-untyped-call]
            hidden_BTD.flatten(0, 1), head.weight, head.bias, next_BT.flatten(), 1.0 / num_tokens, factor, rows, lesson
        )
        found.append(loss_T.view_as(next_BT)[:, :-1])
        said: torch.Tensor = (total / factor).view(1, 1, 1)  # the class multiplies by it
        return said

    with in_place_of(head, loss_of):
        total = model(input_ids=ids_BT, use_cache=False, **inputs).logits
    return total.sum(), found[-1]


def head_factor(model: Any) -> float | None:
    """By what the class multiplies what its output matrix gives (Granite, Cohere); None where it does anything else.

    Found by running the class around a stub of its layers and of its matrix: no weight is touched, and other
    processes need not know of it.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    head, device = model.get_output_embeddings(), model.device
    said = torch.tensor([[[1.0, -30.0]]], dtype=torch.float64, device=device)
    hidden = MoeModelOutputWithPast(last_hidden_state=torch.zeros(1, 1, head.in_features, device=device))
    with (
        torch.no_grad(),
        in_place_of(model.base_model, lambda *_, **__: hidden),
        in_place_of(head, lambda _: said),
    ):
        # Not called but run: hooks would gather the weights of a sharded model.
        logits = model.forward(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False).logits
    factor = float(logits[0, 0, 0])
    same = torch.allclose(logits.double(), said * factor, rtol=1e-5, atol=0.0)
    return factor if same and factor != 0.0 else None


@contextmanager
def in_place_of(module: torch.nn.Module, forward: Any) -> Iterator[None]:
    """`module` computes `forward` while the context is open."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """In what a product with `weight` is computed here: autocast's dtype where it is on."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _LossInParts(torch.autograd.Function):
    """(slope · Σ loss, loss [T]) of hidden states [T, D] and labels [T]; gradients of the first in the forward pass.

    With a lesson the first is slope · (text weight · Σ loss + what the lesson is worth).
    """

    @staticmethod
    def forward(
        context: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_T: torch.Tensor,
        slope: float,
        factor: float,
        rows: int,
        lesson: Lesson | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind, dtype = hidden_TD.device.type, product_dtype(weight_VD)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        hidden, weight = hidden_TD.detach().to(dtype), weight_VD.detach().to(dtype)
        bias = None if bias_V is None else bias_V.detach().to(dtype)
        to_hidden, to_weight, to_bias = (
            torch.zeros_like(given, dtype=wide) if needed and given is not None else None
            for given, needed in zip((hidden_TD, weight_VD, bias_V), context.needs_input_grad, strict=False)
        )
        loss_T = torch.empty(len(labels_T), dtype=wide, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for first in range(0, len(labels_T), rows):
                part = slice(first, first + rows)
                counted_R, label_R1 = labels_T[part] != IGNORED, labels_T[part].clamp_min(0)[:, None]
                logits_RV = F.linear(hidden[part], weight, bias).to(wide)
                if factor != 1.0:
                    logits_RV *= factor
                log_sum_R1 = logits_RV.logsumexp(dim=1, keepdim=True)
                loss_T[part] = (log_sum_R1 - logits_RV.gather(1, label_R1))[:, 0].where(counted_R, 0.0)
                if to_hidden is None and to_weight is None and to_bias is None:
                    continue
                taught_RV = None if lesson is None else lesson.slopes(part, logits_RV, counted_R)
                slopes_RV = logits_RV.sub_(log_sum_R1).exp_()
                slopes_RV.scatter_add_(1, label_R1, torch.full_like(log_sum_R1, -1.0))
                if lesson is not None and taught_RV is not None:
                    slopes_RV.mul_(lesson.text_weight).add_(taught_RV)
                slopes_RV *= slope * factor
                slopes_RV *= counted_R[:, None]
                narrow_RV = slopes_RV.to(dtype)
                if to_hidden is not None:
                    to_hidden[part] = narrow_RV @ weight
                if to_weight is not None:
                    _add_product(to_weight, narrow_RV.t(), hidden[part])
                if to_bias is not None:
                    to_bias += slopes_RV.sum(dim=0)
        dtypes = (None if given is None else given.dtype for given in (hidden_TD, weight_VD, bias_V))
        context.slopes = list(zip((to_hidden, to_weight, to_bias), dtypes, strict=True))
        context.mark_non_differentiable(loss_T)
        total = loss_T.sum()
        if lesson is not None:
            total = (lesson.text_weight * total + lesson.worth()).to(wide)
        return total * slope, loss_T

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place, so once only: another gradient as large as the matrix would be what this is to avoid.
        found, context.slopes = context.slopes, None
        assert found is not None, "a second backward pass"
        slopes = [None if slope is None else slope.mul_(gradient).to(dtype) for slope, dtype in found]
        return (*slopes, None, None, None, None, None)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total` += `left` @ `right`, in place where they are of one dtype; in its own precision otherwise."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
