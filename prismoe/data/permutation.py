"""Arithmetic that lets a data order be computed at any position instead of being stored or replayed."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

__all__ = ["floor_sum", "permute", "round_keys", "splitmix"]

U64Array = npt.NDArray[np.uint64]
ROUNDS = 6


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Σ_{i=0}^{n-1} ⌊(a·i + b) / m⌋ for non-negative integers, in O(log m) like Euclid's algorithm."""
    total = 0
    while True:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        y_max = a * n + b
        if y_max < m:
            return total
        n, b = divmod(y_max, m)
        m, a = a, m


def round_keys(*name: str | int) -> U64Array:
    """[ROUNDS] keys that depend on every part of `name` and on nothing else (no platform, no library version)."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in name)  # NumPy's integers print differently
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def splitmix(x: U64Array) -> U64Array:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit moves about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index_N: U64Array, *, size_N: U64Array, keys_NR: U64Array) -> U64Array:
    """Where each `index` < `size` goes under the permutation of range(size) that its row of keys selects.

    A Feistel network permutes the next power of four; values outside the range walk on along their cycle until they
    are inside (Black and Rogaway 2002), at most four steps on average. No table: any position costs the same.
    """
    sizes, which = np.unique(size_N, return_inverse=True)
    half_N = np.array([max(1, ((int(size) - 1).bit_length() + 1) // 2) for size in sizes], np.uint64)[which]
    mask_N = (np.uint64(1) << half_N) - np.uint64(1)
    value_N = index_N.astype(np.uint64)
    todo = np.arange(len(value_N))
    while len(todo):
        half, mask, keys = half_N[todo], mask_N[todo], keys_NR[todo]
        left, right = value_N[todo] >> half, value_N[todo] & mask
        for r in range(keys.shape[1]):
            left, right = right, left ^ (splitmix(right + keys[:, r]) & mask)
        value_N[todo] = (left << half) | right
        todo = todo[value_N[todo] >= size_N[todo]]
    return value_N
