"""A frozen model that a student learns from while it trains (`pretrain.teacher`; what is learned: `train.lesson`).

It reads what the student reads: the same batch, positions and precision. It is no part of what is saved: a run that
goes on loads it again. Processes hold it in parts, as they do the student.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from prismoe.checkpoint import Checkpoint
from prismoe.train.documents import check_apart
from prismoe.train.engine import Engine
from prismoe.train.head import head_factor, in_place_of, product_dtype
from prismoe.train.lesson import Lesson, Top, top_words
from prismoe.train.logits import rows_at_once
from prismoe.train.model import place_model
from prismoe.train.origin import Origin
from prismoe.train.settings import PretrainConfig
from prismoe.train.speed import flops_per_token

__all__ = ["Teacher"]


class Teacher:
    """A frozen stock model in its place, and how much of what it says is learned from."""

    def __init__(self, model: Any, config: PretrainConfig) -> None:
        self.model, self._config = model, config
        head = model.get_output_embeddings()
        self._factor = head_factor(model) if type(head) is torch.nn.Linear else None

    @classmethod
    def load(cls, checkpoint: Checkpoint, config: PretrainConfig, engine: Engine) -> Teacher:
        """Read the weights of `checkpoint`, which `fit.check_teacher` has found to fit.

        Raises:
            InputError: a tensor is missing, left over, of the wrong shape or not finite.
            UsageError: `attend` is "document" and it does not keep documents apart.
        """
        bf16, whole = config.precision == "bf16", copy(engine)
        whole.layout = replace(engine.layout, experts=1)  # it may have none, or another number
        model = place_model(Origin.folder(checkpoint), whole, bf16=bf16, compiled=config.compile)
        model.eval().requires_grad_(False)
        if config.attend == "document":
            check_apart(model, seq_len=config.seq_len, bf16=bf16)
        return cls(model, config)

    def flops_per_token(self) -> float:
        """A third of those of training: it has no backward pass."""
        return flops_per_token(self.model, seq_len=self._config.seq_len) / 3

    @torch.no_grad()
    def lesson(self, ids_BT: torch.Tensor, **inputs: Any) -> Lesson:
        """What it says of each token of a micro-batch; `inputs` are further arguments of the model.

        Of the likeliest words all is computed here. Otherwise logits are when they are asked for, from hidden states:
        those of a slice of tokens at a time (a class that does more to its logits than a factor keeps them whole).
        """
        rows, config, num_tokens = self._rows(ids_BT, inputs), self._config, ids_BT.numel()
        said: Top | Callable[[slice], torch.Tensor] = rows
        if config.teacher_top:
            at_once = rows_at_once(num_tokens, self.model.config.vocab_size) or num_tokens
            parts = (rows(slice(first, first + at_once)) for first in range(0, num_tokens, at_once))
            words = [top_words(part, config.teacher_top, temperature=config.teacher_temperature) for part in parts]
            said = Top.joined(words)
        return Lesson(said, config.text_weight, config.teacher_weight, config.teacher_temperature)

    def _rows(self, ids_BT: torch.Tensor, inputs: dict[str, Any]) -> Callable[[slice], torch.Tensor]:
        if self._factor is None:
            logits_TV = self.model(input_ids=ids_BT, use_cache=False, **inputs).logits.flatten(0, 1)
            return lambda part: logits_TV[part].to(_wide(logits_TV.dtype), copy=True)
        seen: list[torch.Tensor] = []

        def keep(hidden_BTD: torch.Tensor) -> torch.Tensor:
            seen.append(hidden_BTD)
            return hidden_BTD[..., :1]  # nobody reads it

        head, factor = self.model.get_output_embeddings(), self._factor
        with in_place_of(head, keep):
            self.model(input_ids=ids_BT, use_cache=False, **inputs)
        # The matrix is there after the pass in a sharded model too: its outermost group stays gathered.
        dtype = product_dtype(head.weight)
        hidden_TD, weight_VD = seen[-1].flatten(0, 1).to(dtype), head.weight.to(dtype)
        bias_V = None if head.bias is None else head.bias.to(dtype)

        def rows(part: slice) -> torch.Tensor:
            return F.linear(hidden_TD[part], weight_VD, bias_V).to(_wide(dtype)).mul_(factor)

        return rows


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
