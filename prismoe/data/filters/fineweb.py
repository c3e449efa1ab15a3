"""FineWeb's own rules, added to Gopher's and C4's (Penedo et al. 2024, arXiv:2406.17557, section 3.6).

A page goes when fewer than 12 % of its lines end with a punctuation mark, more than 67 % have at most 30 characters,
over 1 % of its characters lie in repeated lines, or it has more than 3 line breaks in 10 words. The paper gives 0.1 for
the repeated characters; 0.01 is what the authors' released pipeline ran with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.words import Batch

__all__ = ["fingerprint", "open_scorer"]

MIN_ENDED_LINES, MAX_SHORT_LINES, SHORT_LINE = 0.12, 0.67, 30
MAX_DUPLICATE_CHARACTERS, MAX_BREAKS_PER_WORD = 0.01, 0.3
REASONS = (
    "",
    "empty",
    "under 12 % of lines end with a punctuation mark",
    "over 67 % of lines have at most 30 characters",
    "over 1 % of characters in repeated lines",
    "more than 3 line breaks in 10 words",
)
# Sentence ends of scripts in wide use.
_ENDS = tuple(".?!。．｡？！！؟۔।॥։።፧၊။។៕‼⁇⁈⁉‽")


def fingerprint(arguments: Mapping[str, Any]) -> str:
    return "fineweb 2"


def open_scorer() -> _FineWeb:
    """The rules have no arguments: thresholds are the released ones."""
    return _FineWeb()


class _FineWeb:
    reasons = REASONS

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        batch = Batch.of(texts)
        words = np.diff(batch.pieces.ends, prepend=0)
        broken = np.array([_broken(text, int(count)) for text, count in zip(batch, words, strict=True)], np.int64)
        return np.where(broken > 0, -broken.astype(np.float64), 1.0)


def _broken(text: str, words: int) -> int:
    """The first rule that the text breaks, 0 for none."""
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    if not lines or not words:
        return 1
    if sum(line.endswith(_ENDS) for line in lines) < MIN_ENDED_LINES * len(lines):
        return 2
    if sum(len(line) <= SHORT_LINE for line in lines) > MAX_SHORT_LINES * len(lines):
        return 3
    breaks = text.count("\n")
    distinct = set(lines)
    if len(distinct) < len(lines):
        size = sum(map(len, lines)) - sum(map(len, distinct))
        if size > MAX_DUPLICATE_CHARACTERS * (len(text) - breaks):
            return 4
    return 5 if breaks > MAX_BREAKS_PER_WORD * words else 0
