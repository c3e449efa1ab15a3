"""What prompts look like to each FFN: the states that `router=prompts` turns into router rows (mergekit-moe's idea)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismoe.calibrate.parts import Parts
from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.tensorfile import header_bytes
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.errors import InputError, UsageError
from prismoe.folder import write_atomic
from prismoe.progress import Progress, quiet

__all__ = ["prompt_states"]


def prompt_states(
    source: str | Path | Checkpoint,
    prompts: Sequence[Sequence[str]],
    *,
    out: str | Path,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> Path:
    """Write tensors `layers.N.inputs` [E, D]: the mean FFN input over the tokens of each expert's prompts.

    Each prompt counts alike, however long; its start token, which is the same for all, does not count. One layer is in
    memory at a time. A prompt longer than the model's positions is cut.

    Args:
        prompts: for each expert a list of texts.

    Raises:
        UsageError: an expert without prompts, an empty prompt, or experts whose prompts are all the same.
        InputError: a damaged checkpoint, or no tokenizer.
    """
    groups = [tuple(texts) for texts in prompts]
    _check_prompts(groups)
    checkpoint = Checkpoint.open(source, offline=offline)
    if not checkpoint.has_weights:
        raise InputError("no weights", where=str(checkpoint.folder), needed="model.safetensors")
    tokenizer = DocumentTokenizer.open(checkpoint.folder)
    dense = checkpoint.family
    skipped = 0 if tokenizer.start_token is None else 1
    texts = [text for group in groups for text in group]
    ids = [row[:-1][: dense.max_positions] for row in tokenizer.encode(texts)]  # without the end token
    if any(len(row) <= skipped for row in ids):
        text = texts[next(n for n, row in enumerate(ids) if len(row) <= skipped)]
        raise UsageError(f"{text!r} has no tokens"[:80], where="prompts", needed="some text each")
    parts = Parts(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    found = np.empty((dense.num_layers, len(groups), dense.hidden_size), np.float32)
    hidden = [parts.embed(torch.from_numpy(row)[None]) for row in ids]
    for layer in range(dense.num_layers):
        on_progress("prompts", layer, dense.num_layers)
        (base,) = parts.layers(layer, layer + 1)
        means = np.empty((len(hidden), dense.hidden_size))
        for number, states in enumerate(hidden):
            input_TD, hidden[number] = _through(base, states)
            means[number] = input_TD[skipped:].double().mean(dim=0).numpy()
        for expert in range(len(groups)):
            found[layer, expert] = means[owners == expert].mean(axis=0)
    on_progress("prompts", dense.num_layers, dense.num_layers)
    entries = [(f"layers.{layer}.inputs", "F32", rows.shape) for layer, rows in enumerate(found)]
    header = header_bytes(entries, metadata={"format": "prismoe-prompts-1", "source": checkpoint.fingerprint})
    write_atomic(Path(out), header + found.astype("<f4").tobytes())
    return Path(out)


def _check_prompts(groups: Sequence[tuple[str, ...]]) -> None:
    seen: dict[tuple[str, ...], int] = {}
    for expert, texts in enumerate(groups):
        if not texts or not all(text.strip() for text in texts):
            raise UsageError(f"expert {expert} has an empty prompt or none", where="prompts", needed="some text each")
        first = seen.setdefault(tuple(sorted(texts)), expert)
        if first != expert:
            found = f"experts {first} and {expert} have the same prompts"
            raise UsageError(found, where="prompts", needed="different ones")


def _through(base: Any, hidden_1TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([T, D] what the FFN of a one-layer model gets, [1, T, D] what leaves the layer)."""
    caught: list[torch.Tensor] = []
    hook = base.layers[0].mlp.register_forward_pre_hook(lambda module, args: caught.append(args[0][0]))
    try:
        with torch.no_grad():
            after_1TD = base(inputs_embeds=hidden_1TD, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    return caught[0], after_1TD
