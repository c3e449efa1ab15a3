"""Fluency: minus the bits a byte that a causal language model needs for the text, by default the dense parent.

LLaMA-MoE (section 5.1) drops the 15 % least fluent text of CommonCrawl and C4 without saying by what it measures
fluency. Perplexity under a language model is CCNet's measure (Wenzek et al. 2020); bits of a byte, because a token is
not the same amount of text in every document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prismoe.checkpoint import Checkpoint
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.errors import InputError, UsageError

__all__ = ["DROP", "fingerprint", "open_scorer"]

DROP = 0.15
SCORE = "minus bits a byte: more fluent to the right"
_MAX_WINDOW = 1024
_LOGIT_BYTES = 1 << 25  # of one forward pass, in float32


def fingerprint(arguments: Mapping[str, Any]) -> str:
    return f"perplexity 1 {Checkpoint.open(_named(arguments['model'])).fingerprint}"


def open_scorer(
    *,
    model: str | None = None,
    max_bytes: Annotated[int, Field(ge=64)] | None = 8192,
    window: Annotated[int, Field(ge=2)] | None = None,
) -> _Perplexity:
    """
    Args:
        model: a folder of any causal language model with its fast tokenizer.
        max_bytes: how much of a document's beginning is read; null for all of it.
        window: tokens that are scored at once, the first of them the start (else end) token; at most the model's
            context, 1024 where that is longer.

    Raises:
        InputError: no weights, not a causal language model, or no tokenizer of it.
    """
    checkpoint = Checkpoint.open(_named(model))
    return _Perplexity(checkpoint, DocumentTokenizer.open(checkpoint.folder), max_bytes, window)


def _named(model: str | None) -> str:
    if model is None:
        raise UsageError("no model", where="filter perplexity", needed="model: FOLDER, or a run with a source")
    return model


class _Perplexity:
    reasons = ()

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: DocumentTokenizer, max_bytes: int | None, window: int | None
    ) -> None:
        import torch

        where, config = str(checkpoint.folder), checkpoint.config
        kinds = config.get("architectures") or []
        if not any(str(kind).endswith("ForCausalLM") for kind in kinds):
            found = ", ".join(map(str, kinds)) or "no architecture named"
            raise InputError(found, where=f"{where}/config.json", needed="a causal language model (…ForCausalLM)")
        if not checkpoint.has_weights:
            raise InputError("no weights", where=where, needed="model.safetensors")
        context = config.get("max_position_embeddings")
        context = context if isinstance(context, int) else _MAX_WINDOW
        if window is not None and window > context:
            raise UsageError(f"{window}", where="filter perplexity: window", needed=f"at most {context}, its context")
        self._window = window or min(context, _MAX_WINDOW)
        self._model = _load(checkpoint.folder)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        self._tokenizer, self._max_bytes = tokenizer, max_bytes
        self._opener = tokenizer.end_token if tokenizer.start_token is None else tokenizer.start_token

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        import torch

        parts = [text.encode()[: self._max_bytes].decode(errors="ignore") or text[:1] for text in texts]
        windows: list[npt.NDArray[np.int64]] = []
        owners: list[int] = []
        for number, ids in enumerate(self._tokenizer.encode(parts)):
            ids = np.asarray(ids, np.int64)
            ids = ids[self._tokenizer.start_token is not None : -1]  # the text alone
            for first in range(0, len(ids), self._window - 1):
                windows.append(ids[first : first + self._window - 1])
                owners.append(number)
        nats = np.zeros(len(texts))
        # Windows of about one length share a pass: what pads them on the right is seen by nothing before it.
        order = sorted(range(len(windows)), key=lambda index: len(windows[index]), reverse=True)
        place = 0
        while place < len(order):
            longest = len(windows[order[place]])
            rows = order[place : place + min(16, max(1, _LOGIT_BYTES // (4 * longest * self._tokenizer.vocab_size)))]
            targets = np.full((len(rows), longest), -100, np.int64)
            for row, index in enumerate(rows):
                targets[row, : len(windows[index])] = windows[index]
            inputs = np.concatenate([np.full((len(rows), 1), self._opener), np.maximum(targets[:, :-1], 0)], axis=1)
            with torch.inference_mode():
                logits_BTV = self._model(
                    input_ids=torch.from_numpy(inputs).to(self._device), use_cache=False
                ).logits.float()
                losses = torch.nn.functional.cross_entropy(
                    logits_BTV.flatten(0, 1),
                    torch.from_numpy(targets).to(self._device).flatten(),
                    ignore_index=-100,
                    reduction="none",
                )
            sums = losses.view(len(rows), -1).double().sum(dim=1).cpu().numpy()
            np.add.at(nats, [owners[index] for index in rows], sums)
            place += len(rows)
        sizes = np.array([len(part.encode()) for part in parts])
        found: npt.NDArray[np.float64] = -nats / math.log(2) / sizes
        return found


def _load(folder: Path) -> Any:
    """The stock class with its weights, in float32 on a CPU and bfloat16 where there is a GPU, remote code off."""
    import torch
    from transformers import AutoModelForCausalLM

    from prismoe.verify.stock import quietly

    try:
        with quietly():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        line = str(error).strip().partition("\n")[0][:200]
        raise InputError(f"cannot be loaded ({line})", where=str(folder)) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            name = sorted(map(str, report[what]))[0]
            raise InputError(f"{what.replace('_', ' ')}: {len(report[what])}, such as {name}", where=str(folder))
    return model.eval()
