"""C4's page rules (Raffel et al. 2020, JMLR 21:140, section 2.2; phrases and word length are those of its code).

A document is kept or dropped whole: lines that the rules would take out only do not count. The list of bad words is
left out, as in datatrove. A sentence ends with a `.`, `?` or `!` that is no part of an abbreviation or an ellipsis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["fingerprint", "open_scorer"]

MIN_SENTENCES, MIN_LINE_WORDS, MAX_WORD_LENGTH = 5, 3, 1000
PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
REASONS = ("", "lorem ipsum", "curly bracket", "fewer than 5 sentences in whole lines")
_ENDS = (".", "?", "!", '"', "'")
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_ABBREVIATIONS = "".join(
    rf"(?<!\b{name}\.)" for name in ("[A-Za-z]", "Mr", "Ms", "Dr", "St", "Jr", "Mrs", "Inc", "Ltd")
)
_SENTENCE_END = re.compile(rf"[.?!](?<!\.\.)(?!\.)(?:{_ABBREVIATIONS}[\"')\]”’]*(?=\s+\S)|(?<=[a-z]\.)(?=[A-Z]))")


def fingerprint(arguments: Mapping[str, Any]) -> str:
    return "c4 1"


def open_scorer() -> _C4:
    """The rules have no arguments: thresholds are the paper's."""
    return _C4()


class _C4:
    reasons = REASONS

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        broken = np.array([_broken(text) for text in texts], np.int64)
        return np.where(broken > 0, -broken.astype(np.float64), 1.0)


def _broken(text: str) -> int:
    """The first rule that the text breaks, 0 for none."""
    sentences = 0
    for line in text.splitlines():
        line = line.strip()
        if "[" in line:
            line = _CITATION.sub("", line)
        if not line.endswith(_ENDS) or line.endswith("..."):
            continue
        words = line.split()
        if len(words) < MIN_LINE_WORDS or (len(line) > MAX_WORD_LENGTH and max(map(len, words)) > MAX_WORD_LENGTH):
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return 1
        if "javascript" in lower:
            continue
        if "{" in line:
            return 2
        if any(phrase in lower for phrase in PHRASES):
            continue
        if sentences < MIN_SENTENCES:
            sentences += 1 + len(_SENTENCE_END.findall(line))
    return 3 if sentences < MIN_SENTENCES else 0
