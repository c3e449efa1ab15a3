"""The text side of tuning in one call: files in, rendered conversations and a receipt out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismoe.progress import Progress, quiet
from prismoe.tune.render import ChatTemplate, Rendered

__all__ = ["FileReceipt", "TextReceipt", "TuneText", "prepare_text"]


@dataclass(frozen=True)
class FileReceipt:
    """Counts of one file: `rows` read, `refused` by reason with the first place of each, and what the rest became."""

    file: str
    form: str
    rows: int
    conversations: int
    heldout: int
    refused: dict[str, int]
    first: dict[str, str]
    truncated: int
    tokens: int
    supervised: int
    end_of_turn: int


@dataclass(frozen=True)
class TextReceipt:
    """What a run learns from: the template (name, sha256), `max_len`, and each file."""

    template: str
    template_sha256: str
    max_len: int
    files: tuple[FileReceipt, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TuneText:
    """Rendered conversations in reading order, those held out apart."""

    train: list[Rendered]
    heldout: list[Rendered]
    receipt: TextReceipt


def prepare_text(
    files: Sequence[str | Path],
    *,
    template: ChatTemplate,
    tokenizer: Any,
    max_len: int,
    form: str = "auto",
    heldout: float = 0.02,
    seed: int = 0,
    max_refused: float = 0.01,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> TuneText:
    """Read, split and render every conversation.

    `tokenizer` is a stock fast tokenizer (PreTrainedTokenizerFast). A conversation is held out by its own hash, so the
    split depends on neither order nor files.
    """
    raise NotImplementedError
