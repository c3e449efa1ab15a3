"""`generate`: what a model writes after a prompt, with the stock `generate` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.generate.sampling import Sampling

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
    top_p: float = 1.0,
    seed: int = 0,
    template: str | None = None,
    device: str = "cpu",
    offline: bool = False,
) -> tuple[Sample, ...]:
    """Continue each of `prompts` by at most `max_new_tokens` tokens; temperature 0 is greedy, else one seeded draw.

    With `template` (see `tune.render.open_template`) each prompt is a question, and what comes back the answer. Files
    of prompts are the work of `generate.answers.answer_file`.

    Raises:
        UsageError: a prompt without tokens or beyond the model's context, or numbers out of range.
        InputError: a checkpoint without weights or tokenizer, or one that stock transformers cannot load.
    """
    from prismoe.generate.prompts import Prompt
    from prismoe.generate.speaker import Speaker

    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    with Speaker(source, template=template, device=device, offline=offline) as speaker:
        ids = [Prompt.plain(prompt, chat=template is not None).ids(speaker) for prompt in prompts]
        written = [speaker.speak([(one, sampling)])[0].text for one in ids]
    return tuple(Sample(prompt, text) for prompt, text in zip(prompts, written, strict=True))
