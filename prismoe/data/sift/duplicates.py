"""Exact and near duplicates: fingerprints of documents, and which of them came before.

Exact: a 64-bit hash of the text with white space runs as one space. Near: MinHash over five-word shingles of `Keys`
(Broder 1997), 14 bands of 8 values as FineWeb took them (Penedo et al. 2024, section 3.5): two documents are one when
any band agrees, which has the probability 1 - (1 - s⁸)¹⁴ at a share s of common shingles (0.5 at 0.69, 0.92 at 0.8).

A fingerprint is 8 bytes a document on disk, 120 with near duplicates. Finding them holds 24 bytes a document of one
slice of the hash space (`_SLICE` at a time) and 16 for each document that has a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b

import numpy as np

from prismoe.data.words import Batch, Hashes, Longs, ngrams, segments

__all__ = ["BANDS", "first_of_each", "minhash_bands", "text_hashes"]

BANDS, ROWS, SHINGLE = 14, 8, 5
_SLICE = 4_000_000
_PART = 1 << 13  # shingles at a time: products of 16 hash functions stay in the cache
_DRAW = np.random.default_rng(19_970_611)
_FACTORS = (_DRAW.integers(0, 1 << 31, BANDS * ROWS, np.uint32) * np.uint32(2) + np.uint32(1))[:, None]
_TERMS = _DRAW.integers(0, 1 << 32, BANDS * ROWS, np.uint32)[:, None]
_MIX = _DRAW.integers(0, 1 << 63, ROWS, np.uint64) * np.uint64(2) + np.uint64(1)

Pairs = tuple[Hashes, Longs]
"""Some fingerprints and the numbers of their documents."""


def text_hashes(batch: Batch) -> Hashes:
    """[N] uint64."""
    digests = (blake2b(" ".join(text.split()).encode("utf-8"), digest_size=8).digest() for text in batch)
    return np.frombuffer(b"".join(digests), "<u8")


def minhash_bands(batch: Batch) -> Hashes:
    """[N, 14] uint64; 0 in every band of a document with fewer than five words, which is nobody's copy."""
    shingles, ends = ngrams(batch.keys.hashes, batch.keys.ends, SHINGLE)
    # High bits of a product depend on all bits; 32 of them are plenty for the shingles of one document.
    values = ((shingles ^ (shingles >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)).astype(
        np.uint32
    )
    smallest = np.full((BANDS * ROWS, len(batch)), np.uint32(0xFFFFFFFF))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    first = 0
    while first < len(values):
        part = slice(first, min(first + _PART, len(values)))
        rows = np.arange(np.searchsorted(ends, part.start, side="right"), np.searchsorted(starts, part.stop))
        rows = rows[ends[rows] > starts[rows]]
        places = np.maximum(starts[rows] - part.start, 0)
        for function in range(0, BANDS * ROWS, 16):
            some = slice(function, function + 16)
            products = values[part] * _FACTORS[some] + _TERMS[some]
            smallest[some, rows] = np.minimum(smallest[some, rows], np.minimum.reduceat(products, places, axis=1))
        first = part.stop
    bands = (smallest.reshape(BANDS, ROWS, -1).astype(np.uint64) * _MIX[:, None]).sum(axis=1, dtype=np.uint64)
    bands ^= bands >> np.uint64(32)
    bands[bands == 0] = 1
    _, filled = segments(ends)
    bands[:, ~filled] = 0
    return np.ascontiguousarray(bands.T)


def first_of_each(columns: int, read: Callable[[int], Iterator[Pairs]], *, count: int) -> tuple[Longs, Longs]:
    """Which documents are copies, and of which earlier one.

    Args:
        columns: how many fingerprints a document has; one that agrees makes a copy.
        read: column → its fingerprints in order of documents, in parts; 0 is no fingerprint.
        count: documents in all.

    Returns:
        Sorted numbers of the copies, and the number of the first document that each hangs together with (a copy of a
        copy counts as one of the first).
    """
    slices = max(1, -(-count // _SLICE))
    copies, originals = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for column in range(columns):
        for part in range(slices):
            found = [
                (hashes[mine], numbers[mine])
                for hashes, numbers in read(column)
                if (mine := (hashes != 0) & (hashes % np.uint64(slices) == part)).any()
            ]
            if not found:
                continue
            hashes, numbers = (np.concatenate(column) for column in zip(*found, strict=True))
            order = np.argsort(hashes, kind="stable")
            hashes, numbers = hashes[order], numbers[order]
            same = np.concatenate([[False], hashes[1:] == hashes[:-1]])
            first = numbers[np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))]
            if same.any():
                copies = np.concatenate([copies, numbers[same]])
                originals = np.concatenate([originals, first[same]])
                copies, originals = _joined(copies, originals)
    return copies, originals


def _joined(one: Longs, other: Longs) -> tuple[Longs, Longs]:
    """Pairs that belong together → each document but the first of its group, with that first one."""
    names, pairs = np.unique(np.concatenate([one, other]), return_inverse=True)
    one, other = pairs[: len(one)], pairs[len(one) :]
    label = np.arange(len(names))
    while True:
        low = np.minimum(label[one], label[other])
        before = label.copy()
        for end in (one, other):
            np.minimum.at(label, label[end], low)
            np.minimum.at(label, end, low)
        while (label[label] != label).any():
            label = label[label]
        if np.array_equal(label, before):
            break
    later = label != np.arange(len(names))
    return names[later], names[label[later]]
