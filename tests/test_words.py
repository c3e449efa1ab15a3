"""Texts cut into words: pieces as spaCy's English rules cut, keys, and n-grams that stay within one text."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.data import words
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
