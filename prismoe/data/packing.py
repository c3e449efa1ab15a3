"""Rows of a batch: windows cut from streams of documents that lie end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.shards import IGNORED

__all__ = ["Batch", "document_positions", "read_rows"]

IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """One step of one rank.

    `labels` stand at the position of their token, as stock `transformers` models take them (the model shifts by
    one), and are -100 where nothing is to be learned; where nothing is left out they are `input_ids` itself.
    `domain_ids` index `Mixture.names`. `position_ids` count from 0 anew at each document where attention is to stay
    within documents (`attend="document"`), else they are None.
    """

    input_ids: IdArray  # [B, T]
    labels: IdArray  # [B, T]
    domain_ids: IdArray  # [B]
    position_ids: IdArray | None = None  # [B, T]


def read_rows(
    tokens: Sequence[npt.NDArray[np.unsignedinteger[Any]]],
    domain_ids: IdArray,
    begins: IdArray,
    skipped: IdArray,
    *,
    seq_len: int,
    ends: Sequence[IdArray] | None = None,
) -> Batch:
    """Windows of `seq_len` ids from position `begins` [B] of the streams `tokens` [G], as int64.

    The first `skipped` [B] ids of a row have no label (another row has taught them). With `ends` (of the documents of
    each stream), positions count anew at each document, and a document's first token has no label: the position that
    would predict it belongs to the document before.
    """
    input_ids = np.empty((len(begins), seq_len), np.int64)
    for row, g, begin in zip(input_ids, domain_ids.tolist(), begins.tolist(), strict=True):
        row[:] = tokens[g][begin : begin + seq_len]
    labels = input_ids
    if skipped.any() or ends is not None:
        labels = input_ids.copy()
        for number in np.flatnonzero(skipped).tolist():
            labels[number, : skipped[number]] = IGNORED
    if ends is None:
        return Batch(input_ids, labels, domain_ids)
    position_ids = np.empty_like(input_ids)
    for number, (g, begin) in enumerate(zip(domain_ids.tolist(), begins.tolist(), strict=True)):
        starts, position_ids[number] = document_positions(ends[g], begin, seq_len=seq_len)
        labels[number, starts] = IGNORED
    return Batch(input_ids, labels, domain_ids, position_ids)


def document_positions(ends: IdArray, begin: int, *, seq_len: int) -> tuple[IdArray, IdArray]:
    """Where documents begin inside the window (after its first id), and the position of each id in its document.

    A document that has begun before the window counts from the window's first id.
    """
    first, last = np.searchsorted(ends, [begin + 1, begin + seq_len])
    starts = ends[first:last] - begin
    lengths = np.diff(starts, prepend=0, append=seq_len)
    return starts, np.arange(seq_len) - np.repeat(np.concatenate([[0], starts]), lengths)
