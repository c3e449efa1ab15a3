"""Which tokens of a text a trace keeps one by one: pieces drawn by a seed before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prismoe.data.permutation import permute, round_keys

__all__ = ["NO_TOKEN", "PIECE", "Piece", "draw_pieces"]

PIECE = 64
"""Tokens in a row that are kept together: enough for a few words around any of them."""
NO_TOKEN = -1
"""Stands behind each piece, and fills up the sample of a short text."""


@dataclass(frozen=True)
class Piece:
    """`length` tokens from `first` of window `window` (0 is its opening token) go to the sample from `place` on."""

    window: int
    first: int
    length: int
    place: int


def draw_pieces(spans_W2: npt.NDArray[np.int64], *, size: int, name: str, seed: int) -> list[Piece]:
    """Pieces of windows that fill at most `size` places, one left free behind each, in the order of the text.

    A row of `spans_W2` is the first and last + 1 position of a window in the text.

    Every piece is as likely as every other; which ones depends on `seed`, `name` and the spans alone, so a text that
    is traced again with another model or batch size gives the same tokens.
    """
    lengths_W: npt.NDArray[np.int64] = spans_W2[:, 1] - spans_W2[:, 0]
    ends_W = np.cumsum(-(-lengths_W // PIECE))
    count = int(ends_W[-1])
    drawn = np.arange(min(count, size), dtype=np.uint64)
    sizes, keys = (
        np.full(len(drawn), count, np.uint64),
        np.tile(round_keys("trace sample", seed, name), (len(drawn), 1)),
    )
    numbers = permute(drawn, size_N=sizes, keys_NR=keys).astype(np.int64)
    window_N = np.searchsorted(ends_W, numbers, side="right")
    first_N = (numbers - np.concatenate([[0], ends_W[:-1]])[window_N]) * PIECE
    length_N = np.minimum(PIECE, lengths_W[window_N] - first_N)
    kept = np.flatnonzero(np.cumsum(length_N + 1) <= size)
    kept = kept[np.argsort(spans_W2[window_N[kept], 0] + first_N[kept], kind="stable")]
    places = np.cumsum(length_N[kept] + 1) - length_N[kept] - 1
    rows = zip(
        window_N[kept].tolist(), (first_N[kept] + 1).tolist(), length_N[kept].tolist(), places.tolist(), strict=True
    )
    return [Piece(*row) for row in rows]
