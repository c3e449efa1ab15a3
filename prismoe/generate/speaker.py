"""A model that continues text and, with a chat template, answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError, UsageError
from prismoe.panics import read_tokenizer, told

if TYPE_CHECKING:
    from prismoe.generate.rows import Written
    from prismoe.generate.sampling import Sampling
    from prismoe.tune.conversations import Message

__all__ = ["Speaker", "Speech"]


@dataclass(frozen=True)
class Speech:
    """What was written after a prompt: text without control tokens, its ids, and `ended` where the model ended it."""

    text: str
    ids: tuple[int, ...]
    ended: bool


class Speaker:
    """A model folder with its tokenizer and, where one is named, a chat template; a context manager.

    The weights are read on first use, so that prompts can be looked at before. `context` is how many ids the model
    was made for, None where its config does not say.

    Args:
        source: an HF folder or hub name, with weights and `tokenizer.json`.
        template: as in `tune.render.open_template`: `model`, a name or a file; None for plain text only.
        device: auto (a GPU where there is one), cpu or cuda. A GPU computes in the config's dtype, a CPU in float32.
        offline: only what is in the hub's cache already.

    Raises:
        InputError: no weights, no tokenizer, or a template that cannot be used with it.
        UsageError: an unknown template or device.
    """

    def __init__(
        self, source: str | Path | Checkpoint, *, template: str | None, device: str = "auto", offline: bool = False
    ) -> None:
        from prismoe.tune.render import open_template
        from prismoe.tune.rows import open_tokenizer

        self.checkpoint = Checkpoint.open(source, offline=offline)
        self.folder = self.checkpoint.folder
        file = self.folder / "tokenizer.json"
        if not self.checkpoint.has_weights or not file.is_file():
            raise InputError("no weights or no tokenizer.json", where=str(self.folder), needed="both")
        self._device = _device(device)
        self._tokenizer = read_tokenizer(file)
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        self._special = sorted(special, key=len, reverse=True)
        self._model: Any = None
        self.template = None
        if template is not None:
            self.template = open_template(template, tokenizer=open_tokenizer(self.checkpoint))
        limit = self.checkpoint.config.get("max_position_embeddings")
        self.context = limit if isinstance(limit, int) and limit > 1 else None

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process that renders the template."""
        if self.template is not None:
            self.template.close()

    @property
    def model(self) -> Any:
        """The stock causal-LM, in evaluation mode.

        Raises:
            InputError: stock transformers cannot load it.
        """
        if self._model is None:
            import torch

            from prismoe.train.model import load_model

            name = self.checkpoint.config.get("dtype") or self.checkpoint.config.get("torch_dtype")
            wide = self._device == "cpu" or name not in ("bfloat16", "float16")
            dtype = torch.float32 if wide else getattr(torch, str(name))
            self._model = load_model(self.folder, dtype=dtype).eval().to(self._device)
        return self._model

    @property
    def ends(self) -> frozenset[int]:
        """End tokens: the template's and those that config.json and generation_config.json name."""
        named = [self.model.config.eos_token_id, self.model.generation_config.eos_token_id]
        found = {end for one in named for end in (one if isinstance(one, list) else [one]) if end is not None}
        return frozenset(found | ({self.template.end_token} if self.template is not None else set()))

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text, begun as the tokenizer begins one.

        Raises:
            UsageError: it has none.
        """
        with told(self.folder / "tokenizer.json"):
            ids: list[int] = self._tokenizer.encode(text).ids
        if not ids:
            raise UsageError(f"prompt {text!r} has no tokens", needed="at least one")
        return ids

    def prompt_ids(self, messages: Sequence[Message], *, where: str = "") -> list[int]:
        """Ids of a conversation up to where the answer begins.

        Raises:
            BadDocument: the template refuses it, or a message holds a control token.
        """
        assert self.template is not None, "opened without a template"
        ids: list[int] = self.template.prompt(messages, where=where).tolist()
        return ids

    def room(self, ids: Sequence[int], sampling: Sampling) -> int:
        """How many ids may follow; 0 or less where the prompt fills the context already."""
        most = sampling.max_new_tokens
        return most if self.context is None else min(most, self.context - len(ids))

    def speak(
        self,
        prompts: Sequence[tuple[Sequence[int], Sampling]],
        *,
        on_pass: Callable[[], None] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Speech]:
        """What follows each prompt, computed as one batch; see `rows.continue_rows`.

        Raises:
            UsageError: a prompt fills the model's context.
        """
        from prismoe.generate.rows import Row, continue_rows

        rows = []
        for ids, sampling in prompts:
            if (room := self.room(ids, sampling)) < 1:
                raise UsageError(f"a prompt of {len(ids):,} ids", needed=f"fewer than the model's {self.context:,}")
            rows.append(Row(ids, sampling, room))
        found = continue_rows(self.model, rows, ends=self.ends, on_pass=on_pass, on_token=on_token)
        return [self._speech(one) for one in found]

    def text(self, ids: Iterable[int]) -> str:
        """Text of ids, without control tokens, also where they were written letter by letter."""
        text: str = self._tokenizer.decode(list(ids))
        while any(token in text for token in self._special):
            for token in self._special:
                text = text.replace(token, "")
        return text

    def token(self, number: int) -> str:
        """The tokenizer's own name of an id."""
        return self._tokenizer.id_to_token(number) or f"<{number}>"

    def _speech(self, found: Written) -> Speech:
        return Speech(self.text(found.ids), found.ids, found.ended)


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {name!r}", needed="auto, cpu or cuda")
    if name == "cpu":
        return name
    import torch

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UsageError("no GPU here", where="device", needed="auto or cpu")
    return "cuda" if found else "cpu"
