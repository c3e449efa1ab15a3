"""`generate`: what a model writes after a prompt, with the stock `generate` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError, UsageError

__all__ = ["Sample", "generate"]


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model wrote after it."""

    prompt: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def generate(
    source: str | Path | Checkpoint,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    offline: bool = False,
) -> tuple[Sample, ...]:
    """Continue each of `prompts` by at most `max_new_tokens` tokens; temperature 0 is greedy, else one seeded draw.

    Raises:
        UsageError: a prompt without tokens, or numbers out of range.
        InputError: a checkpoint without weights or tokenizer, or one that stock transformers cannot load.
    """
    import torch
    from tokenizers import Tokenizer

    from prismoe.train.model import load_model

    if max_new_tokens < 1 or temperature < 0:
        raise UsageError(
            f"max_new_tokens {max_new_tokens}, temperature {temperature}", needed="at least 1 and at least 0"
        )
    checkpoint = Checkpoint.open(source, offline=offline)
    file = checkpoint.folder / "tokenizer.json"
    if not checkpoint.has_weights or not file.is_file():
        raise InputError("no weights or no tokenizer.json", where=str(checkpoint.folder), needed="both")
    tokenizer = Tokenizer.from_file(str(file))
    model = load_model(checkpoint.folder)
    end = checkpoint.config.get("eos_token_id")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    samples = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt).ids
        if not ids:
            raise UsageError(f"prompt {prompt!r} has no tokens", needed="at least one")
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)  # the same draw for every model and prompt, so that what differs is the model
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=max_new_tokens,
                pad_token_id=end[0] if isinstance(end, list) else end,
                **sampling,
            )
        samples.append(Sample(prompt, tokenizer.decode(output[0, len(ids) :].tolist())))
    return tuple(samples)
