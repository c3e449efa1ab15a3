"""Texts cut into words, many at a time: what rules, n-gram filters and duplicate search look at.

Two readings of the same text:

- *pieces*, close to how spaCy's English rules cut (which datatrove's filters count by): punctuation marks and
  contractions stand alone, numbers, abbreviations and addresses stay whole. A text is split at white space, and each
  distinct part is taken apart once and remembered, so that the work for one more word is a look-up;
- *keys*, the bare words: see `keys.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import overload

import numpy as np
import numpy.typing as npt

from prismoe.data.keys import Hashes, Keys, Longs, read_keys

__all__ = ["STOP_WORDS", "Batch", "Hashes", "Keys", "Longs", "Pieces", "ngrams", "segments"]

# Two of these must occur in English prose: Gopher, Rae et al. 2021 (arXiv:2112.11446), appendix A1.1.
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_WORD = r"[^\W_](?:\w*[^\W_])?"
# Marks inside a word that do not cut it. spaCy's infixes cut at ellipses, at a full stop before a capital, at dashes
# and the like between letters, and at operators between digits.
_INNER = (
    r"(?:(?!['’](?:[sdmSDM]|re|ve|ll|RE|VE|LL)\b)(?:[^\w\s,:<>=/.…–—~+*^-]|_|[,:<>=/–—~](?![^\W\d_])|-(?![\w-])"
    r"|(?<=[^\W\d_])-(?=\d)|(?<!\w)(?:[:<>=/–—~]|(?<!-)-(?!-))|(?<![^\W\d_]),|(?<!\d)[+*^]|[+*^](?![\d-])"
    r"|(?<![a-z.])\.(?!\.)|(?<!\.)\.(?![A-Z.\"'“”’])))+"
)
# Marks after a word that stay with it.
_AFTER = (
    r"(?:(?<=[a-z0-9][A-Z])\.(?!\w)"
    r"|(?:[/\\~@|^=]|(?<!-)-(?!-)|(?<=[^\W\d_])[+%]+|(?<!\d)\$|[)\]}]*\$\.|[)\]}]+\$)+(?!\w))?"
)
_FACES = r"[:;=]['o-]?[()\[\]{}|/\\>]+(?![\w/])|[)\]}]:|\(;|''"
_PIECE = re.compile(
    r"\n"
    r"|(?:https?://|www\.)[^\s\"<>]*[\w/](?:(?<=/)\.)?|(?:[A-Za-z0-9][\w-]*\.)+[a-z]{2,}(?!\w)(?:/[^\s\"<>]*[\w/])?"
    r"|(?<!\S)[:;]-?[()DP|/](?!\S)"
    r"|(?:gon(?=na\b)|got(?=ta\b))"
    r"|\w+?(?=n['’]t\b)|n['’]t\b"
    r"|['’](?:[sdmSDM]|re|ve|ll|RE|VE|LL|em|cause|Cause|til|cos|bout)\b"
    r"|(?i:goin|doin|nothin|somethin|lovin|havin|ol)['’](?!\w)|(?:US|[AC])\$(?=\d)"
    r"|(?:[A-Za-z]\.)+(?![\w])"
    r"|(?:Mrs?|Ms|Dr|St|Jr|Inc|Ltd|Co|Corp|Prof|Rev|Gen|Gov|Rep|Sen|Bros|Adm|Mt|vs|Ph\.D"
    r"|Ala|Ariz|Ark|Calif|Colo|Conn|Del|Fla|Ga|Ill|Ind|Kan|Ky|La|Mass|Mich|Minn|Miss|Mo|Mont|Neb|Nev|Okla|Ore|Pa|Tenn"
    r"|Va|Wash|Wis"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.(?!\w)"
    r"|can(?=not\b)|Can(?=not\b)|and/or"
    r"|\d+(?:[.,]\d+)*(?=(?:[kcmnd]?m|ha|ft|k?g|lb|oz|mph|[mkgt]b|[MKGT]B?|[ap]m)\b)"
    rf"|(?:(?<!\S)[-/\\@^|~・][-./\\@^|~\[({{\"“‘_]*|(?<![\w.)\]])[-./\\@^|~+]+)?{_WORD}(?:{_INNER}{_WORD})*{_AFTER}"
    rf"|{_FACES}"
    r"|[-./\\@^|~\u200b]{2,}"
    r"|\S"
)
_LETTER, _WORDED = re.compile(r"[^\W\d_]"), re.compile(r"[^\W_]")
_BLOCK = 1 << 20  # characters that are split at once: a list of words needs ten times their memory
_MAX_KNOWN, _MAX_CHARACTERS = 300_000, 1 << 23  # distinct pieces, and characters of them, before all are forgotten
# Odd multipliers of the places of an n-gram, a fixed draw: results must be the same everywhere, for ever.
_PLACES = np.random.default_rng(20_211_208).integers(0, 1 << 63, 16, np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Surface words of N texts, P in all. `ends` [N] are running counts.

    `lengths` [P] are characters, `hashes` [P] tell pieces apart, `alphabetic` and `worded` [P] say whether a piece
    has a letter, and a letter or digit; `stop_words` [P] has bit i set for STOP_WORDS[i].
    """

    lengths: Longs
    hashes: Hashes
    alphabetic: npt.NDArray[np.bool_]
    worded: npt.NDArray[np.bool_]
    stop_words: npt.NDArray[np.uint8]
    ends: Longs


class Batch(Sequence[str]):
    """Some texts that several filters look at: they are read once."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)

    @classmethod
    def of(cls, texts: Sequence[str]) -> Batch:
        return texts if isinstance(texts, Batch) else cls(texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._texts[index]

    def __len__(self) -> int:
        return len(self._texts)

    @cached_property
    def pieces(self) -> Pieces:
        global _known
        if _known.full:  # memory stays bounded; frequent words are soon back
            _known = _Known()
        return _known.read(self._texts)

    @cached_property
    def keys(self) -> Keys:
        return read_keys(self._texts)


class _Numbered(dict[str, int]):
    """Gives every new text the next number; `new` are those that nobody has looked at yet."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, text: str) -> int:
        number = self[text] = len(self)
        self.new.append(text)
        return number

    def of(self, texts: Iterable[str]) -> Longs:
        return np.fromiter(map(self.__getitem__, texts), np.int64)


class _Known:
    """Every distinct text between white space so far (a chunk), with the pieces that it is made of."""

    def __init__(self) -> None:
        self._chunks, self._pieces = _Numbered(), _Numbered()
        self._pieces["\n"] = 0  # stands between chunks while new ones are taken apart
        self._characters = 0
        self._rows, self._ends = np.zeros(0, np.int64), np.zeros(1, np.int64)
        self._attributes = np.zeros((4, 1), np.int64)  # lengths, alphabetic, worded, stop words
        self._hashes = np.zeros(1, np.uint64)

    @property
    def full(self) -> bool:
        return len(self._chunks) > _MAX_KNOWN or self._characters > _MAX_CHARACTERS

    def read(self, texts: Sequence[str]) -> Pieces:
        parts, ends = [], np.zeros(len(texts), np.int64)
        for number, text in enumerate(texts):
            for block in _blocks(text):
                parts.append(self._chunks.of(block.split()))
                ends[number] += len(parts[-1])
        self._take_apart()
        chunks = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        places, ends = _expand(chunks, np.cumsum(ends), self._ends)
        rows = self._rows[places]
        lengths, alphabetic, worded, stop_words = self._attributes
        return Pieces(
            lengths=lengths[rows],
            hashes=self._hashes[rows],
            alphabetic=alphabetic.astype(bool)[rows],
            worded=worded.astype(bool)[rows],
            stop_words=stop_words.astype(np.uint8)[rows],
            ends=ends,
        )

    def _take_apart(self) -> None:
        """The new chunks, all at once: one text with a line for each."""
        if not self._chunks.new:
            return
        text = "\n".join([*self._chunks.new, ""])
        self._chunks.new.clear()
        self._characters += len(text)
        rows, ends = _lines(self._pieces.of(_PIECE.findall(text)))
        self._ends = np.append(self._ends, ends + len(self._rows))
        self._rows = np.append(self._rows, rows)
        new = self._pieces.new
        attributes = np.array(
            [
                [len(piece) for piece in new],
                [_LETTER.search(piece) is not None for piece in new],
                [_WORDED.search(piece) is not None for piece in new],
                [1 << STOP_WORDS.index(piece) if piece in STOP_WORDS else 0 for piece in new],
            ],
            np.int64,
        )
        self._attributes = np.append(self._attributes, attributes, axis=1)
        self._hashes = np.append(self._hashes, np.frombuffer(b"".join(map(_hash, new)), "<u8"))
        new.clear()


_known = _Known()


def _lines(rows: Longs) -> tuple[Longs, Longs]:
    """Numbers with a 0 after each line → those without, and the running counts of them where lines end."""
    marks = np.flatnonzero(rows == 0)
    return rows[rows != 0], marks - np.arange(len(marks))


def _expand(rows: Longs, ends: Longs, part_ends: Longs) -> tuple[Longs, Longs]:
    """Places of the parts of all `rows` in order, and the running counts of parts where texts end."""
    first, count = part_ends[rows], part_ends[rows + 1] - part_ends[rows]
    running = np.cumsum(count)
    places = np.arange(running[-1] if len(running) else 0) + np.repeat(first - (running - count), count)
    return places, np.concatenate([[0], running])[ends]


def _blocks(text: str) -> Iterator[str]:
    """`text` in parts of about a megabyte, cut at white space."""
    start = 0
    while len(text) - start > _BLOCK:
        end = next((place for place in range(start + _BLOCK, len(text)) if text[place].isspace()), len(text))
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _hash(piece: str) -> bytes:
    return blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def ngrams(hashes: Hashes, ends: Longs, size: int) -> tuple[Hashes, Longs]:
    """Hashes of all runs of `size` words that lie within one text, in order, and the running counts [N] of them."""
    count = max(len(hashes) - size + 1, 0)
    mixed = hashes[:count] * _PLACES[0]
    for place in range(1, size):
        mixed += hashes[place : place + count] * _PLACES[place]
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    lengths = np.maximum(ends - starts - size + 1, 0)
    if len(ends) == 1 or not count:
        return mixed, np.cumsum(lengths)
    inside = np.zeros(count + 1, np.int64)
    whole = lengths > 0
    np.add.at(inside, starts[whole], 1)
    np.add.at(inside, starts[whole] + lengths[whole], -1)
    return mixed[np.cumsum(inside[:-1]) > 0], np.cumsum(lengths)


def segments(ends: Longs) -> tuple[Longs, npt.NDArray[np.bool_]]:
    """Starts of the non-empty segments for `ufunc.reduceat`, and which of all segments those are."""
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    filled = ends > starts
    return starts[filled], filled
