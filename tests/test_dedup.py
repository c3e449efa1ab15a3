"""Copies: bands that agree, groups that hang together, and which of them came first."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.data.sift import duplicates
from prismoe.data.sift.duplicates import BANDS, ROWS, first_of_each, minhash_bands, text_hashes
from prismoe.data.words import Batch


def test_exact_hashes_ignore_white_space_alone() -> None:
    found = text_hashes(Batch(["a  text\n", "a text", "A text", "a text 2"]))
    assert found[0] == found[1]
    assert len(set(found.tolist())) == 3


def test_bands_agree_as_often_as_the_formula_says() -> None:
    """Pairs of 400 words, one of them changed every so often: the share of common shingles is counted, not assumed."""
    generator = random.Random(0)
    words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(5000)]
    texts, shares = [], []
    for _ in range(400):
        one = [generator.choice(words) for _ in range(300)]
        two = [generator.choice(words) if generator.random() < 0.035 else word for word in one]
        sets = [{tuple(part[i : i + 5]) for i in range(len(part) - 4)} for part in (one, two)]
        shares.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        texts += [" ".join(one), " ".join(two)]
    bands = minhash_bands(Batch(texts))
    agree = (bands[::2] == bands[1::2]).mean(axis=1)
    expected = np.array(shares) ** ROWS
    # 400 pairs of 14 bands each: the mean is within four standard errors of what independence gives.
    error = np.sqrt((expected * (1 - expected)).sum() / BANDS) / len(expected)
    assert abs(agree.mean() - expected.mean()) < 4 * error
    assert abs((agree > 0).mean() - (1 - (1 - expected) ** BANDS).mean()) < 0.1


def test_bands_do_not_depend_on_the_batch_and_short_texts_have_none() -> None:
    generator = random.Random(1)
    texts = [" ".join(generator.choice("abcdefgh") * 3 for _ in range(generator.randrange(60))) for _ in range(30)]
    texts[3] = " ".join(f"long{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(9000))
    alone = np.concatenate([minhash_bands(Batch([text])) for text in texts])
    assert np.array_equal(minhash_bands(Batch(texts)), alone)
    short = np.array([len(text.split()) < 5 for text in texts])
    assert np.array_equal((alone == 0).all(axis=1), short)
    assert short.any()
    assert (alone[~short] != 0).all()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25), st.integers(1, 9))
def test_groups_are_those_of_a_search_and_the_first_stays(rows: list[tuple[int, int]], size: int) -> None:
    table = np.array(rows, np.uint64).reshape(-1, 2)

    def read(column: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(table), 4):
            yield table[first : first + 4, column], np.arange(first, min(first + 4, len(table)))

    group = list(range(len(table)))  # by hand: join until nothing changes
    for _ in table:
        for i in range(len(table)):
            for j in range(i):
                if any(table[i, c] == table[j, c] != 0 for c in range(2)):
                    group[i] = group[j] = min(group[i], group[j])
    whole, duplicates._SLICE = duplicates._SLICE, size
    try:
        copies, originals = first_of_each(2, read, count=len(table))
    finally:
        duplicates._SLICE = whole
    assert dict(zip(copies.tolist(), originals.tolist(), strict=True)) == {
        i: first for i, first in enumerate(group) if i != first
    }
