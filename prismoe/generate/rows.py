"""Several prompts continued at once with the stock `generate` of transformers, each row with its own draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from prismoe.generate.sampling import Sampling

__all__ = ["Row", "Stopped", "Written", "continue_rows"]


@dataclass(frozen=True)
class Row:
    """Ids of a prompt, how to draw what follows, and `room`: how many ids may follow, at least one."""

    ids: Sequence[int]
    sampling: Sampling
    room: int


@dataclass(frozen=True)
class Written:
    """Ids that follow a prompt, without the end token; `ended` where there was one."""

    ids: tuple[int, ...]
    ended: bool


class Stopped(Exception):
    """Raised by a callback to stop writing."""


def continue_rows(
    model: Any,
    rows: Sequence[Row],
    *,
    ends: Iterable[int],
    on_pass: Callable[[], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[Written]:
    """What follows each row, up to one of the ids `ends` or to the end of its room.

    Draws of a row depend on its sampling alone; logits differ from those of other batches by rounding, because
    shorter prompts are padded on the left.

    Args:
        model: a stock causal-LM; its own generation settings are not looked at.
        rows: at least one.
        ends: end tokens.
        on_pass: called after each forward pass over a single row, the first of which reads the prompt.
        on_token: called with each id of a single row as soon as it is known, the end token included. `Stopped` raised
            in it ends the answer there.
    """
    assert len(rows) == 1 or (rows and on_pass is None and on_token is None), "a stream has one row"
    ends = frozenset(ends)
    device = next(model.parameters()).device
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for index, row in enumerate(rows):
        ids_BT[index, longest - len(row.ids) :] = torch.as_tensor(list(row.ids))
        mask_BT[index, longest - len(row.ids) :] = 1
    stream = _Stream(on_token)
    settings = GenerationConfig(
        do_sample=False,  # the processor has drawn already
        max_new_tokens=max(row.room for row in rows),
        pad_token_id=0,
        eos_token_id=sorted(ends) or None,
    )
    stock, model.generation_config = model.generation_config, GenerationConfig()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it takes padding for text when it speaks of a full context
    try:
        with torch.no_grad():
            found_BT = model.generate(
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_Draw(rows, on_pass)]),
                streamer=stream if on_token is not None else None,
            )
        written = found_BT[:, longest:].tolist()
    except Stopped:
        written = [stream.ids]
    finally:
        model.generation_config = stock
        transformers_logging.set_verbosity(verbosity)
    return [_cut(ids[: row.room], ends) for ids, row in zip(written, rows, strict=True)]


def _cut(ids: list[int], ends: frozenset[int]) -> Written:
    end = next((place for place, number in enumerate(ids) if number in ends), None)
    return Written(tuple(ids[:end]), end is not None)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves each row that is drawn with one possible token: a draw of its own generator, on the CPU."""

    def __init__(self, rows: Sequence[Row], on_pass: Callable[[], None] | None) -> None:
        self._rows, self._on_pass = rows, on_pass
        self._draws = [torch.Generator().manual_seed(row.sampling.seed) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._on_pass is not None:
            self._on_pass()
        for index, row in enumerate(self._rows):
            if not row.sampling.temperature:
                continue
            logits_1V = scores[index : index + 1].float().cpu() / row.sampling.temperature
            if row.sampling.top_p < 1:
                logits_1V = TopPLogitsWarper(row.sampling.top_p)(input_ids[index : index + 1], logits_1V)
            chosen = int(torch.multinomial(logits_1V.softmax(-1)[0], 1, generator=self._draws[index]))
            scores[index] = -torch.inf
            scores[index, chosen] = 0.0
        return scores


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Hands ids on as they come; the first thing that comes is the prompt."""

    def __init__(self, on_token: Callable[[int], None] | None) -> None:
        self._on_token, self._begun = on_token, False
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if self._begun and self._on_token is not None:
            self.ids.append(int(value))
            self._on_token(self.ids[-1])
        self._begun = True

    def end(self) -> None:
        """Nothing is held back."""
