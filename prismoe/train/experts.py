"""The experts of a stock mixture on a CPU: sort once, one product per expert, one weighted sum.

transformers dispatches the forward pass of every stock class of experts through a public table
(`ALL_EXPERTS_FUNCTIONS`); the function here is one more entry of it, so that no class is changed and what is saved
knows nothing of it. It computes what the library's "eager" does, up to rounding, and differs in what it moves:

- an assignment's weight is applied before down_proj, to W numbers instead of D (W·(w·a) = w·(W·a));
- rows go out by `index_select` and come back by `embedding_bag`, which gathers and adds up K rows in one pass;
- the gradient of stacked weights is written in place, expert by expert, never a full-size one for each expert;
- products of oneDNN (CPU, bfloat16) get rounded numbers of rows: it compiles anew for each that it has not seen.

Products need no aligned rows, incoming gradients may be expanded, and under autocast all of it is in its dtype
(the library's "grouped_mm" fails at the first two and ignores the last).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from prismoe.errors import UsageError
from prismoe.train.device import matmul_precision
from prismoe.train.liger import has_liger, liger_experts

__all__ = ["experts_functions", "experts_in_use", "experts_of", "rule", "sorted_experts", "use_experts"]

_OURS = "prismoe_"  # before the names of what we add to the library's table
_ROW = 8  # numbers of bfloat16 in 16 bytes


def use_experts(model: Any, wanted: str = "auto", *, device: torch.device | str = "cpu") -> None:
    """Let the experts of `model` compute by `wanted` on `device`, before it is sharded; a dense model has none.

    `wanted` is a name of `experts_functions`, or "auto" for `rule`.

    Raises:
        UsageError: the function is not here, or the device or the sizes of the experts do not allow it.
    """
    modules = experts_of(model)
    if not modules:
        return
    named = experts_functions()
    choice = rule(modules, device=device) if wanted == "auto" else wanted
    odd = _odd(modules)
    if choice == "grouped_mm" and odd:
        raise UsageError(
            f"experts with rows of {odd[0]} numbers",
            where="pretrain.experts",
            needed=f"a multiple of {_ROW} for grouped_mm",
            hint="experts=auto takes another way",
        )
    try:
        model.set_experts_implementation(named.get(choice, choice))
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{choice} ({error})", where="pretrain.experts", hint="experts=auto takes another way"
        ) from error


def experts_in_use(model: Any) -> str | None:
    """By which of them the experts of `model` compute; None where there are none that could be told."""
    if not experts_of(model):
        return None
    return str(model.config._experts_implementation).removeprefix(_OURS)


def experts_functions() -> dict[str, str]:
    """Every function that the library can be told to use in this process, ours among them: name -> its name there."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(f"{_OURS}sorted", sorted_experts)
    if has_liger():
        ALL_EXPERTS_FUNCTIONS.register(f"{_OURS}liger", liger_experts)
    return {name.removeprefix(_OURS): name for name in ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]}


def rule(modules: list[Any], *, device: torch.device | str) -> str:
    """What "auto" is for these experts: "sorted" on a CPU; elsewhere the library's "grouped_mm", but "sorted" where
    rows are no multiple of 16 bytes.

    That is a rule and not a trial: the same wherever a run goes on. (What it rests on: docs/benchmarks.md. For a
    trial: `train.fastest`.)
    """
    return "sorted" if torch.device(device).type == "cpu" or _odd(modules) else "grouped_mm"


def _odd(modules: list[Any]) -> list[int]:
    return [size for module in modules for size in module.down_proj.shape[1:] if size % _ROW]


def experts_of(model: Any) -> list[Any]:
    """The modules of experts that the library dispatches: it gives each of them this attribute."""
    return [module for module in model.modules() if hasattr(module, "is_transposed") and hasattr(module, "down_proj")]


def sorted_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Forward pass of a stock module of experts.

    Args:
        self: holds `gate_up_proj` [E, 2W, D] (or `up_proj`) and `down_proj` [E, D, W], `is_transposed` or not, with
            biases or without, and what lies between them in `_apply_gate`.
        hidden_states: [T, D].
        top_k_index: [T, K]; under expert parallelism numbers from E on are of other processes and add nothing.
        top_k_weights: [T, K].

    Returns:
        [T, D] in the dtype of `hidden_states`.
    """
    kind = hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.down_proj.dtype
    x_TD = hidden_states.to(dtype)
    first, last = (weight.to(dtype) for weight in _projections(self))
    if len(x_TD) == 1 and not torch.is_grad_enabled() and not self.has_bias and not self.has_post_expert_norm:
        out_TD = _one_token(self, x_TD, top_k_index, top_k_weights, first, last)
    else:
        out_TD = _many_tokens(self, x_TD, top_k_index, top_k_weights, first, last)
    return out_TD.to(hidden_states.dtype)


def _projections(self: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacked [E, out, in] views, whatever the layout."""
    pair = (self.gate_up_proj if self.has_gate else self.up_proj, self.down_proj)
    return (pair[0].mT, pair[1].mT) if self.is_transposed else pair


def _many_tokens(
    self: Any,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
) -> torch.Tensor:
    order_S, place_TK, counts, free_S1 = _layout(index_TK, self.num_experts, rounded=_compiled_by_size(x_TD))
    token_S = order_S // index_TK.shape[1]
    weight_S1 = weights_TK.reshape(-1, 1).index_select(0, order_S).to(x_TD.dtype)
    if free_S1 is not None:
        weight_S1 = weight_S1.masked_fill(free_S1, 0.0)
    if self.has_bias or self.has_post_expert_norm:
        expert_S = index_TK.reshape(-1).index_select(0, order_S)

    between = _apply(_Products, _apply(_Spread, x_TD, token_S, place_TK), first, counts)
    if self.has_bias:
        here_S = expert_S.clamp(max=self.num_experts - 1)  # others' assignments have weight 0
        bias_EW = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        between = between + bias_EW.to(x_TD.dtype).index_select(0, here_S)
    between = self._apply_gate(between) if self.has_gate else self.act_fn(between)
    if not self.has_bias and not self.has_post_expert_norm:
        return _apply(_Collect, _apply(_Products, between * weight_S1, last, counts), token_S, place_TK)
    made_SD = _apply(_Products, between, last, counts)
    if self.has_bias:
        made_SD = made_SD + self.down_proj_bias.to(x_TD.dtype).index_select(0, here_S)
    if self.has_post_expert_norm:
        made_SD = self.post_expert_norm(made_SD)
    here_S1 = (expert_S < self.num_experts)[:, None]
    return _apply(_Collect, (made_SD * weight_S1).where(here_S1, 0.0), token_S, place_TK)


def _layout(
    index_TK: torch.Tensor, num_experts: int, *, rounded: bool
) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor | None]:
    """In what order the assignments are computed.

    Returns:
        The assignment of each row, by expert [S]; the row of each assignment [T, K]; the rows of each expert; and
        which rows are free [S, 1], None if none is: with `rounded` there are some, so that numbers of rows recur. Free
        rows repeat assignment 0, and count for nothing with a weight of 0.
    """
    expert_A, order_A = torch.sort(index_TK.reshape(-1), stable=True)
    counts = torch.bincount(expert_A, minlength=num_experts)[:num_experts].tolist()
    row_A = torch.arange(len(order_A), device=order_A.device)
    order_S, rows, free_S1 = order_A, [_round_up(count) for count in counts] if rounded else counts, None
    if rows != counts:
        before = [0, *accumulate(more - count for more, count in zip(rows, counts, strict=True))]  # free rows
        row_A += row_A.new_tensor(before).index_select(0, expert_A.clamp(max=num_experts))
        order_S = order_A.new_zeros(len(order_A) + before[-1]).index_copy_(0, row_A, order_A)
        free_S1 = torch.ones(len(order_S), 1, dtype=torch.bool, device=row_A.device).index_fill_(0, row_A, False)
    place_A = torch.empty_like(order_A)
    place_A[order_A] = row_A
    return order_S, place_A.view_as(index_TK), rows, free_S1


def _compiled_by_size(x: torch.Tensor) -> bool:
    """Whether oneDNN computes the products of `x`: those in bfloat16, and with `fast_matmul` those in float32.

    It compiles them anew for every number of rows that it has not seen, which takes half a millisecond.
    """
    fast = x.dtype == torch.float32 and matmul_precision() == "medium"
    return x.device.type == "cpu" and (fast or x.dtype == torch.bfloat16)


def _round_up(count: int) -> int:
    """The next number with at most five bits before its zeros: no more than 1/16 is added, nothing up to 32."""
    unit = 1 << max(0, count.bit_length() - 5)
    return -(-count // unit) * unit


def _one_token(
    self: Any,
    x_1D: torch.Tensor,
    index_1K: torch.Tensor,
    weights_1K: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
) -> torch.Tensor:
    """Generation: nothing to sort, and no gradient. What it costs beside reading weights is the number of calls."""
    index_K = index_1K[0].tolist()
    if self._is_expert_parallel:
        kept = [k for k, e in enumerate(index_K) if e < self.num_experts]
        index_K, weights_1K = [index_K[k] for k in kept], weights_1K[:, kept]
        if not kept:
            return torch.zeros_like(x_1D)
    between_KW = torch.cat([F.linear(x_1D, first[e]) for e in index_K])
    between_KW = self._apply_gate(between_KW) if self.has_gate else self.act_fn(between_KW)
    between_KW = between_KW * weights_1K.to(x_1D.dtype).t()
    out_1D = F.linear(between_KW[:1], last[index_K[0]])
    for k, e in enumerate(index_K[1:], start=1):
        out_1D += F.linear(between_KW[k : k + 1], last[e])
    return out_1D


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    return function.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def _add_up(rows_SD: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """[T, D]: the sum of the K rows of each token, added up in at least float32."""
    return F.embedding_bag(place_TK, rows_SD, mode="sum")


class _Spread(torch.autograd.Function):
    """A row for each assignment, in the order of experts."""

    @staticmethod
    def forward(context: Any, x_TD: torch.Tensor, token_S: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(place_TK)
        return x_TD.index_select(0, token_S)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _add_up(gradient.contiguous(), *context.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """The sum of each token's rows: the transpose of `_Spread`."""

    @staticmethod
    def forward(context: Any, rows_SD: torch.Tensor, token_S: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(token_S)
        return _add_up(rows_SD, place_TK)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.index_select(0, *context.saved_tensors), None, None


class _Products(torch.autograd.Function):
    """x @ weight[e].T for the `counts[e]` rows of each expert e in turn; rows behind them give zero."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        context.save_for_backward(x, weight)
        context.counts = counts
        out = x.new_empty(len(x), weight.shape[1])
        for e, rows in _runs(counts, out):
            torch.mm(x[rows], weight[e].t(), out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = context.saved_tensors
        gradient = gradient.contiguous()
        to_x = torch.empty_like(x) if context.needs_input_grad[0] else None
        to_weight = torch.empty_like(weight) if context.needs_input_grad[1] else None
        for e, rows in _runs(context.counts, to_x):
            if to_x is not None:
                torch.mm(gradient[rows], weight[e], out=to_x[rows])
            if to_weight is not None:
                torch.mm(gradient[rows].t(), x[rows], out=to_weight[e])
        if to_weight is not None:
            for e, count in enumerate(context.counts):
                if not count:
                    to_weight[e].zero_()
        return to_x, to_weight, None


def _runs(counts: list[int], out: torch.Tensor | None) -> list[tuple[int, slice]]:
    """The rows of each expert that has some; what `out` has behind them is cleared."""
    runs, begin = [], 0
    for e, count in enumerate(counts):
        if count:
            runs.append((e, slice(begin, begin + count)))
        begin += count
    if out is not None:
        out[begin:].zero_()
    return runs
