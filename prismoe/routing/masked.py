"""A mixture with experts removed against the whole one whose routers see -inf in their place, both as stock classes.

Hidden states of real text go through both, layer by layer in float32, in the memory of two layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError, NumericalError
from prismoe.progress import Progress
from prismoe.verify import stock
from prismoe.verify.sample import sample_ids

__all__ = ["Proof", "compare_masked"]

LIMIT = 1e-6
"""Relative Frobenius error of an FFN output in float32."""
SLACK = 1e-5  # of the greatest logit: a gap that float32 products of another shape do not resolve


@dataclass(frozen=True)
class Proof:
    """`ffn` is the worst layer's relative error of the FFN output, at layer `worst`, over the tokens of `input`;
    `logits` the relative error of the whole models' logits. `ties` are choices between two equal logits that fell
    otherwise: their tokens are left out of `ffn`, and `logits` is None where there are any.
    """

    ffn: float
    worst: int
    limit: float
    logits: float | None
    ties: int
    num_tokens: int
    input: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def compare_masked(
    whole: Checkpoint, pruned: Checkpoint, kept: Mapping[int, list[int]], *, tokens: int, on_progress: Progress
) -> Proof:
    """`kept` are the experts of `whole` that `pruned` has, by layer.

    Raises:
        InputError: a stock class does not load one of the folders.
        NumericalError: they compute different things.
    """
    vocab_size, positions = whole.config["vocab_size"], whole.config.get("max_position_embeddings", tokens)
    ids, origin = sample_ids(whole.folder, num_tokens=min(tokens, positions), vocab_size=vocab_size)
    ends = _loaded(stock.load_ends(whole), whole)
    masked_TD = own_TD = ends.embed(torch.from_numpy(ids))
    errors, ties, num_layers = {}, 0, int(whole.config["num_hidden_layers"])
    for layer in range(num_layers):
        on_progress("comparing with masked experts", layer, num_layers)
        before, after = (_loaded(stock.load_layer(folder, layer), folder) for folder in (whole, pruned))
        if layer not in kept:
            masked_TD, own_TD = before.run(masked_TD).hidden_TD, after.run(own_TD).hidden_TD
            continue
        with _masked(before, kept[layer]):
            expected = before.run(masked_TD)
            chosen_TK = before.route(expected.input_TD)[1]
        same_T = _same_choice(after, expected.input_TD, chosen_TK, kept[layer], where=f"{pruned.folder}: layer {layer}")
        ties += int((~same_T).sum())
        errors[layer] = _error(after.ffn(expected.input_TD)[same_T], expected.output_TD[same_T])
        masked_TD, own_TD = expected.hidden_TD, after.run(own_TD).hidden_TD
    on_progress("comparing with masked experts", num_layers, num_layers)
    worst = max(errors, key=lambda layer: errors[layer])
    logits = None if ties else _error(_loaded(stock.load_ends(pruned), pruned).logits(own_TD), ends.logits(masked_TD))
    proof = Proof(errors[worst], worst, LIMIT, logits, ties, len(ids), origin)
    if not proof.ffn <= LIMIT:
        raise NumericalError(
            f"not what the whole model computes with these experts masked: {proof.ffn:.3g}",
            where=f"{pruned.folder}: layer {worst}",
            needed=f"at most {LIMIT:g}",
        )
    return proof


def _loaded(pair: tuple[Any, stock.Loading], checkpoint: Checkpoint) -> Any:
    found, loading = pair
    if loading.problems:
        raise InputError(f"stock class does not load it: {loading.problems[0]}", where=str(checkpoint.folder))
    return found


class _MinusInfinity(TorchFunctionMode):
    """Products with the router's rows come out as -inf for `gone` experts; everything else is as it was."""

    def __init__(self, rows: torch.Tensor, gone: torch.Tensor) -> None:
        super().__init__()
        self._rows, self._gone = rows, gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        linear = func is torch.nn.functional.linear
        if linear and args[1].data_ptr() == self._rows.data_ptr() and args[1].shape == self._rows.shape:
            result = result.index_fill(-1, self._gone, -math.inf)
        return result


@contextmanager
def _masked(layer: stock.Layer, kept: list[int]) -> Iterator[None]:
    """The routers of `layer` never choose another expert; a selection bias of the others is -inf as well."""
    router, rows = stock.find_router(layer.module)
    gone = torch.tensor([expert for expert in range(len(rows.weight)) if expert not in set(kept)], dtype=torch.long)
    biases = _biases(router)
    before = [bias.clone() for bias in biases]
    try:
        for bias in biases:
            bias.data.index_fill_(-1, gone, -math.inf)
        with _MinusInfinity(rows.weight, gone):
            yield
    finally:
        for bias, old in zip(biases, before, strict=True):
            bias.data.copy_(old)


def _biases(router: Any) -> list[torch.Tensor]:
    named = [*router.named_parameters(), *router.named_buffers()]
    return [tensor for name, tensor in named if name.endswith("e_score_correction_bias")]


def _same_choice(
    after: stock.Layer, input_TD: torch.Tensor, chosen_TK: torch.Tensor, kept: list[int], *, where: str
) -> torch.Tensor:
    """[T] whether both models chose the same experts.

    Raises:
        NumericalError: they did not, and not because of logits that are equal but for rounding.
    """
    rows_ED, own_TK = after.route(input_TD)
    same_T = (chosen_TK.sort(-1).values == torch.tensor(kept)[own_TK].sort(-1).values).all(-1)
    if bool(same_T.all()):
        return same_T
    logits_TE = input_TD.double() @ rows_ED.double().T
    places = torch.full((max(kept) + 1,), -1)
    places[torch.tensor(kept)] = torch.arange(len(kept))
    least = [logits_TE.gather(1, chosen).min(-1).values for chosen in (places[chosen_TK], own_TK)]
    tied_T = (least[0] - least[1]).abs() <= SLACK * logits_TE.abs().max(-1).values + 1e-7
    if not bool((same_T | tied_T).all()) or any(
        bool(bias.any()) for bias in _biases(stock.find_router(after.module)[0])
    ):
        raise NumericalError(f"{int((~same_T).sum())} tokens go to other experts", where=where, needed="the same ones")
    return same_T


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64; 0 where both are zero."""
    found, expected = found.double(), expected.double()
    difference, size = float((found - expected).norm()), float(expected.norm())
    return difference / size if size else (0.0 if difference == 0.0 else math.inf)
