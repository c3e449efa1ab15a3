"""Gopher's quality and repetition rules (Rae et al. 2021, arXiv:2112.11446, appendix A1.1 and table A1); English.

Words are `Batch.pieces`. Where the paper leaves room, datatrove's reading is followed: length and number of words
count those with a letter or digit, shares of characters are of the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.words import Batch, Longs, Pieces, ngrams, segments

__all__ = ["fingerprint", "open_scorer"]

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_LENGTH, MAX_MEAN_LENGTH = 3, 10
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES, MAX_ELLIPSIS_LINES = 0.9, 0.3
MIN_ALPHABETIC_WORDS, MIN_STOP_WORDS = 0.8, 2
MAX_DUPLICATE_LINES, MAX_DUPLICATE_LINE_CHARACTERS = 0.30, 0.20  # the same for paragraphs
MAX_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
MAX_DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

REASONS = (
    "empty",
    "under 50 words",
    "over 100,000 words",
    "mean word under 3 characters",
    "mean word over 10 characters",
    "more than 1 # in 10 words",
    "more than 1 ellipsis in 10 words",
    "over 90 % bullet lines",
    "over 30 % lines end with an ellipsis",
    "under 80 % of words have a letter",
    "fewer than 2 common words",
    "repeated paragraphs",
    "repeated lines",
    *(f"one {size}-gram is over {100 * share:g} %" for size, share in MAX_TOP.items()),
    *(f"repeated {size}-grams are over {100 * share:g} %" for size, share in MAX_DUPLICATE.items()),
)
_PARAGRAPH, _LINE = re.compile(r"\n{2,}"), re.compile(r"\n+")


def fingerprint(arguments: Mapping[str, Any]) -> str:
    return "gopher 2"


def open_scorer() -> _Gopher:
    """The rules have no arguments: thresholds are the paper's."""
    return _Gopher()


class _Gopher:
    reasons = ("", *REASONS)

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        batch = Batch.of(texts)
        broken = np.zeros((len(REASONS), len(batch)), bool)
        words = _words(batch, broken[:11])
        for number, text in enumerate(batch):
            broken[5:9, number] = _symbols(text, int(words[number]))
            broken[11:13, number] = _repeated_lines(text)
        sizes = np.array([max(len(text), 1) for text in batch])
        _repeated_words(batch.pieces, sizes, broken[13:])
        return np.where(broken.any(axis=0), -1.0 - broken.argmax(axis=0), 1.0)


def _words(batch: Batch, broken: npt.NDArray[np.bool_]) -> Longs:
    """Rules on counts of words; returns how many words each text has."""
    pieces = batch.pieces
    starts, filled = segments(pieces.ends)
    count, worded, length, alphabetic = (np.zeros(len(batch), np.int64) for _ in range(4))
    stop = np.zeros(len(batch), np.uint8)
    count[filled] = np.diff(np.append(starts, len(pieces.lengths)))
    if len(starts):
        worded[filled] = np.add.reduceat(pieces.worded, starts, dtype=np.int64)
        length[filled] = np.add.reduceat(pieces.lengths * pieces.worded, starts)
        alphabetic[filled] = np.add.reduceat(pieces.alphabetic, starts, dtype=np.int64)
        stop[filled] = np.bitwise_or.reduceat(pieces.stop_words, starts)
    mean = length / np.maximum(worded, 1)
    broken[0] = count == 0
    broken[1] = worded < MIN_WORDS
    broken[2] = worded > MAX_WORDS
    broken[3] = mean < MIN_MEAN_LENGTH
    broken[4] = mean > MAX_MEAN_LENGTH
    broken[9] = alphabetic < MIN_ALPHABETIC_WORDS * count
    broken[10] = np.bitwise_count(stop) < MIN_STOP_WORDS
    return count


def _symbols(text: str, words: int) -> tuple[bool, bool, bool, bool]:
    """Hashes, ellipses, bullet lines and lines that end with an ellipsis."""
    allowed = MAX_SYMBOLS_PER_WORD * words
    ellipses = text.count("...") + text.count("…")
    lines = text.splitlines() or [""]
    bullets = sum(line.lstrip()[:1] in ("•", "-") for line in lines) if "•" in text or "-" in text else 0
    trailing = sum(line.rstrip().endswith(("...", "…")) for line in lines) if ellipses else 0
    return (
        text.count("#") > allowed,
        ellipses > allowed,
        bullets > MAX_BULLET_LINES * len(lines),
        trailing > MAX_ELLIPSIS_LINES * len(lines),
    )


def _duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many of `parts` were there before, and how many characters those have."""
    seen = set(parts)
    if len(seen) == len(parts):
        return 0, 0
    return len(parts) - len(seen), sum(map(len, parts)) - sum(map(len, seen))


def _repeated_lines(text: str) -> tuple[bool, bool]:
    inner = text.strip()
    paragraphs = _PARAGRAPH.split(inner) if "\n\n\n" in inner else inner.split("\n\n")
    lines = _LINE.split(text) if "\n\n" in text else text.split("\n")
    found = []
    for parts in (paragraphs, lines):
        count, size = _duplicates(parts)
        few = count <= MAX_DUPLICATE_LINES * len(parts) and size <= MAX_DUPLICATE_LINE_CHARACTERS * len(text)
        found.append(not few)
    return found[0], found[1]


def _repeated_words(pieces: Pieces, sizes: Longs, broken: npt.NDArray[np.bool_]) -> None:
    """Table A1's n-grams: the most frequent short one, and the part of the text in repeated long ones."""
    for row, (size, share) in enumerate(MAX_TOP.items()):
        broken[row] = _top_characters(pieces, size) > share * sizes
    bound = _repeated_bound(pieces, min(MAX_DUPLICATE))
    starts = np.concatenate([[0], pieces.ends[:-1]])
    for text in np.flatnonzero(bound > min(MAX_DUPLICATE.values()) * sizes):  # the others cannot break any of them
        part = slice(int(starts[text]), int(pieces.ends[text]))
        for row, (size, share) in enumerate(MAX_DUPLICATE.items(), start=len(MAX_TOP)):
            found = _repeated_characters(pieces.hashes[part], pieces.lengths[part], size)
            broken[row, text] = found > share * sizes[text]


def _windows(pieces: Pieces, size: int) -> tuple[npt.NDArray[np.uint64], Longs, Longs]:
    """Hash of every n-gram within a text (texts told apart), the place of its first word, and running counts."""
    hashes, ends = ngrams(pieces.hashes, pieces.ends, size)
    counts = np.diff(ends, prepend=0)
    texts = np.repeat(np.arange(len(ends)), counts)
    starts = np.concatenate([[0], pieces.ends[:-1]])
    places = np.arange(len(hashes)) + np.repeat(starts - (ends - counts), counts)
    return hashes + texts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15), places, ends


def _top_characters(pieces: Pieces, size: int) -> Longs:
    """Characters (single spaces between words) of all occurrences of each text's most frequent n-gram, [N]."""
    hashes, places, ends = _windows(pieces, size)
    found = np.zeros(len(ends), np.int64)
    starts, filled = segments(ends)
    if not len(starts):
        return found
    order = np.argsort(hashes)
    begins = np.flatnonzero(np.concatenate([[True], np.diff(hashes[order]) != 0]))
    counts = np.diff(np.append(begins, len(order)))
    first = np.minimum.reduceat(order, begins)
    # One number per n-gram, at its first occurrence: the count, and for equal counts the earlier one.
    rank = np.zeros(len(order), np.int64)
    rank[first] = (counts << 40) | ((1 << 40) - 1 - first)
    best = np.maximum.reduceat(rank, starts)
    place = places[(1 << 40) - 1 - (best & ((1 << 40) - 1))]
    running = np.concatenate([[0], np.cumsum(pieces.lengths)])
    found[filled] = (best >> 40) * (running[place + size] - running[place] + size - 1)
    return found


def _repeated_bound(pieces: Pieces, size: int) -> Longs:
    """Characters of words in any n-gram that was there before: no less than any longer n-gram's can be."""
    hashes, places, _ = _windows(pieces, size)
    again = np.zeros(len(hashes), bool)
    if len(hashes):
        order = np.argsort(hashes)
        begins = np.flatnonzero(np.concatenate([[True], np.diff(hashes[order]) != 0]))
        again[:] = True
        again[np.minimum.reduceat(order, begins)] = False
    marks = np.zeros(len(pieces.lengths) + 1, np.int64)
    np.add.at(marks, places[again], 1)
    np.add.at(marks, places[again] + size, -1)
    running = np.concatenate([[0], np.cumsum(pieces.lengths * (np.cumsum(marks[:-1]) > 0))])
    ends = np.concatenate([[0], pieces.ends])
    found: Longs = np.diff(running[ends])
    return found


def _repeated_characters(hashes: npt.NDArray[np.uint64], lengths: Longs, size: int) -> int:
    """Characters in n-grams that were there before, none counted twice: after one, the search goes on behind it."""
    grams = ngrams(hashes, np.array([len(hashes)]), size)[0].tolist()
    running = np.concatenate([[0], np.cumsum(lengths)])
    seen: set[int] = set()
    total = place = 0
    while place < len(grams):
        if grams[place] in seen:
            total += int(running[place + size] - running[place])
            place += size
        else:
            seen.add(grams[place])
            place += 1
    return total
