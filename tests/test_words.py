"""Texts cut into words: pieces as spaCy's English rules cut, keys, and n-grams that stay within one text."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.data import keys, words
from prismoe.data.keys import read_keys
from prismoe.data.words import STOP_WORDS, Batch, ngrams


def test_pieces_stand_alone_as_marks_and_contractions_do() -> None:
    # Lengths by hand: It 's $ 3.50 , she said - do n't !
    pieces = Batch(["It's $3.50, she-said: don't!"]).pieces
    assert pieces.lengths.tolist() == [2, 2, 1, 4, 1, 3, 1, 4, 1, 2, 3, 1]
    assert pieces.worded.tolist() == [True, True, False, True, False, True, False, True, False, True, True, False]
    assert pieces.alphabetic.sum() == 6  # a number has no letter
    assert pieces.ends.tolist() == [12]


def test_keys_forget_case_marks_accents_and_numbers() -> None:
    keys = Batch(["Résumé, 3.5 KM (fast)!", "resume 7 km FAST", "other"]).keys
    assert keys.ends.tolist() == [4, 8, 9]
    assert keys.hashes[:4].tolist() == keys.hashes[4:8].tolist()
    assert len(set(keys.hashes.tolist())) == 5


# Pieces of words, numbers, accents, other alphabets, and marks that are three bytes long.
ATOMS = [
    "word",
    "Ä",
    "é",
    "3",
    "42",
    "3.5",
    "1,000",
    ".",
    ",",
    " ",
    "  ",
    "\n",
    "-",
    "’",
    "—",
    "…",
    "\u00a0",
    "_",
    "д",
    "漢",
]


def words_of(text: str) -> list[str]:
    """The same by regular expressions."""
    text = "".join(mark for mark in unicodedata.normalize("NFKD", text).lower() if not unicodedata.combining(mark))
    return ["0" if word[0].isdigit() else word for word in re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+", text)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(ATOMS), max_size=12).map("".join), min_size=1, max_size=4), st.integers(8, 40))
def test_keys_are_the_words_whatever_the_blocks(texts: list[str], block: int) -> None:
    whole, keys._BLOCK = keys._BLOCK, max(block, *(len(text.encode()) + 1 for text in texts))
    try:
        found = read_keys(texts)
    finally:
        keys._BLOCK = whole
    expected = [words_of(text) for text in texts]
    assert found.ends.tolist() == np.cumsum([len(words) for words in expected]).tolist()
    alone = [int(read_keys([word]).hashes[0]) for words in expected for word in words]
    assert found.hashes.tolist() == alone
    assert len(set(alone)) == len({word for words in expected for word in words})


def test_a_word_longer_than_a_block_is_cut_at_one_place_wherever_it_stands() -> None:
    word = "".join(chr(97 + i % 26) for i in range(3 * keys._BLOCK))
    alone = read_keys([word]).hashes.tolist()
    assert len(alone) == 3
    assert read_keys(["some words", f"before {word} after"]).hashes.tolist()[3:-1] == alone


def test_stop_words_are_marked() -> None:
    pieces = Batch(["the cat and The dog"]).pieces
    assert pieces.stop_words.tolist() == [1 << STOP_WORDS.index("the"), 0, 1 << STOP_WORDS.index("and"), 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=7), min_size=1, max_size=6), st.integers(1, 4))
def test_ngrams_are_those_of_each_text_and_equal_where_words_are(texts: list[list[str]], size: int) -> None:
    keys = Batch([" ".join(text) for text in texts]).keys
    hashes, ends = ngrams(keys.hashes, keys.ends, size)
    expected = [tuple(text[i : i + size]) for text in texts for i in range(len(text) - size + 1)]
    assert ends.tolist() == np.cumsum([max(len(text) - size + 1, 0) for text in texts]).tolist()
    assert len(hashes) == len(expected)
    assert len(set(hashes.tolist())) == len(set(expected))
    assert len(set(zip(hashes.tolist(), expected, strict=True))) == len(set(expected))


def test_what_is_known_does_not_change_a_reading() -> None:
    texts = ["Some words, some twice.", "", "   ", "words again"]
    before = Batch(texts)
    expected = before.pieces, before.keys
    words._known = words._Known()
    Batch(["quite different things go first", *texts]).pieces  # noqa: B018 - numbers are given in another order
    for found, wanted in zip((Batch(texts).pieces, Batch(texts).keys), expected, strict=True):
        assert found.hashes.tolist() == wanted.hashes.tolist()
        assert found.ends.tolist() == wanted.ends.tolist()


def test_a_long_text_is_cut_in_parts_without_a_seam() -> None:
    text = " ".join(f"word{i} and" for i in range(300))
    whole = Batch([text]).pieces
    block, words._BLOCK = words._BLOCK, 64
    try:
        parts = Batch([text]).pieces
    finally:
        words._BLOCK = block
    assert parts.hashes.tolist() == whole.hashes.tolist()
