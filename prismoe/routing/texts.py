"""What a trace reads: windows over the held-out text of prepared domains, and over benchmark items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.permutation import permute, round_keys
from prismoe.data.shards import Domain, heldout_windows
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.errors import InputError
from prismoe.folder import MANIFEST, sha256_file
from prismoe.routing.benchmarks import read_items
from prismoe.routing.record import Kind

__all__ = ["TracedText", "benchmark_text", "domain_text"]

LOT = 256  # items tokenised at a time
IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TracedText:
    """Windows of one domain or benchmark: row w of `spans_W2` is the first and last + 1 position in `tokens`.

    The longest windows come first. `sha256` is that of the manifest or file that the text is from.
    """

    name: str
    kind: Kind
    tokens: npt.NDArray[np.unsignedinteger[Any]]
    spans_W2: IdArray
    start_token: int
    sha256: str

    def batches(self, size: int) -> Iterator[tuple[int, IdArray]]:
        """(number of the first window, [B, T] ids, each row opened by the start token), at most `size` rows.

        Windows of one length make up a batch: padding would be routed too.
        """
        lengths_W = self.spans_W2[:, 1] - self.spans_W2[:, 0]
        changes = np.flatnonzero(np.diff(lengths_W)) + 1
        for first, stop in zip([0, *changes.tolist()], [*changes.tolist(), len(lengths_W)], strict=True):
            for begin in range(first, stop, size):
                rows = range(begin, min(begin + size, stop))
                ids_BT = np.empty((len(rows), int(lengths_W[begin]) + 1), np.int64)
                ids_BT[:, 0] = self.start_token
                for row, number in enumerate(rows):
                    ids_BT[row, 1:] = self.tokens[slice(*self.spans_W2[number].tolist())]
                yield begin, ids_BT


def domain_text(domain: Domain, *, seq_len: int, max_tokens: int | None, seed: int) -> TracedText:
    """Windows of the held-out split, cut as evaluation cuts them; those that hold `max_tokens` are drawn by `seed`.

    Raises:
        InputError: nothing is held out.
    """
    if not domain.splits["heldout"].num_bytes:
        raise InputError("no held-out text", where=str(domain.folder), hint="prepare the domain with a heldout file")
    windows = heldout_windows(domain, seq_len=seq_len)
    return TracedText(
        name=domain.name,
        kind="train",
        tokens=domain.tokens("heldout"),
        spans_W2=_drawn(windows.spans, max_tokens, round_keys("trace windows", seed, domain.name)),
        start_token=windows.start_token,
        sha256=sha256_file(domain.folder / MANIFEST),
    )


def _drawn(spans_W2: IdArray, max_tokens: int | None, keys: npt.NDArray[np.uint64]) -> IdArray:
    """Windows that hold at most `max_tokens` (one at least), in their order; the keys say which."""
    count = len(spans_W2)
    lengths_W = spans_W2[:, 1] - spans_W2[:, 0]
    if max_tokens is None or int(lengths_W.sum()) <= max_tokens:
        return spans_W2
    order = permute(
        np.arange(count, dtype=np.uint64), size_N=np.full(count, count, np.uint64), keys_NR=np.tile(keys, (count, 1))
    ).astype(np.int64)
    kept = order[: max(1, int(np.searchsorted(np.cumsum(lengths_W[order]), max_tokens, side="right")))]
    return spans_W2[np.sort(kept)]


def benchmark_text(
    name: str, path: Path, tokenizer: DocumentTokenizer, *, seq_len: int, max_tokens: int | None
) -> TracedText:
    """The first items of a benchmark whose ids are at most `max_tokens` (one at least), each a document of its own.

    Raises:
        InputError: see `read_items`.
    """
    parts: list[IdArray] = []
    size = 0
    rows, full = read_items(path), False
    while not full and (items := list(islice(rows, LOT))):
        for ids in tokenizer.encode([item.text for item in items]):
            text = ids[int(tokenizer.start_token is not None) : -1]
            if full := bool(parts) and max_tokens is not None and size + len(text) > max_tokens:
                break
            parts.append(text)
            size += len(text)
    ends = np.cumsum([len(part) for part in parts])
    cuts = [
        (cut, min(cut + seq_len - 1, end))
        for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)
        for cut in range(begin, end, seq_len - 1)
    ]
    spans = np.array(cuts, np.int64).reshape(-1, 2)
    return TracedText(
        name=name,
        kind="benchmark",
        tokens=np.concatenate(parts).astype(np.uint32),
        spans_W2=spans[np.argsort(spans[:, 0] - spans[:, 1], kind="stable")],
        start_token=tokenizer.end_token if tokenizer.start_token is None else tokenizer.start_token,
        sha256=sha256_file(path),
    )
