"""From columns to decisions: a threshold for each filter and domain, then why each document is dropped.

The order is fixed: documents without text, those with benchmark words, those that a filter drops (in the order of the
filters; thresholds are of all documents of a domain with text), then copies of what is left. A file that an earlier
sift decided on keeps its decisions, so that its tokens stay valid; new files are decided by the same thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.sift.columns import ColumnWriter, read
from prismoe.data.sift.duplicates import BANDS, Pairs, first_of_each
from prismoe.data.sift.work import Filter, Part, Work
from prismoe.errors import InputError

__all__ = ["EMPTY", "IN_BENCHMARK", "KEPT", "Copies", "decide", "domain_scores", "reason_names", "threshold"]

KEPT, EMPTY, BENCHMARK, EXACT, NEAR, FILTERS = 0, 1, 2, 3, 4, 5
"""Values of the column `why`; the filter at place i drops with FILTERS + i."""

IN_BENCHMARK = "13 words of a benchmark"

RULES_THRESHOLD = 0.5  # a rule set gives 1 to what passes
Folders = Mapping[str, Path]
Copies = list[tuple[Part, int, Part, int]]
"""Some documents that were dropped as copies, each with the one that stays: (file, row) of both."""


def reason_names(work: Work) -> dict[int, str]:
    """Value of `why` → words."""
    return {
        EMPTY: "no text",
        BENCHMARK: IN_BENCHMARK,
        EXACT: "exact copy",
        NEAR: "near copy",
        **{FILTERS + item.place: item.title for item in work.filters},
    }


def domain_scores(
    work: Work, item: Filter, domain: str, folder: Path
) -> Iterator[tuple[Part, npt.NDArray[np.float64]]]:
    """Scores of a domain file by file, NaN for documents without text."""
    for part in work.parts:
        if part.domain == domain and part.split == "train":
            yield part, read(folder, part.stem, item.column)


def threshold(work: Work, item: Filter, domain: str, folder: Path) -> float:
    """The score below which a document is dropped: `drop` of the documents with text, or fewer where scores are equal.

    Raises:
        InputError: too few documents to drop a part of, or one score for all.
    """
    if item.drop is None:
        return RULES_THRESHOLD
    count, low, high = 0, np.inf, -np.inf
    for _, scores in domain_scores(work, item, domain, folder):
        if len(scores := scores[~np.isnan(scores)]):
            count, low, high = count + len(scores), min(low, scores.min()), max(high, scores.max())
    where = f"filter {item.name}, domain {domain}"
    rank = int(item.drop * count)
    if rank < 1:
        hint = "give it more text, or leave it out of the filter's domains"
        raise InputError(f"{count} documents", where=where, needed=f"{-int(-1 // item.drop)} to drop one", hint=hint)
    if low == high:
        raise InputError(
            f"all {count} documents have one score ({low:g})", where=where, hint="it cannot tell them apart"
        )
    return _order_statistic(
        [lambda p=part: read(folder, p.stem, item.column) for part, _ in domain_scores(work, item, domain, folder)],
        rank,
    )


def _order_statistic(columns: Sequence[Any], rank: int) -> float:
    """The number with `rank` others below it in sorted order, four passes over the columns in little memory."""
    prefix = np.uint64(0)
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for column in columns:
            keys = _sortable(column())
            if shift < 48:
                keys = keys[keys >> np.uint64(shift + 16) == prefix]
            digits = (keys >> np.uint64(shift)) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        running = np.cumsum(counts)
        digit = int(np.searchsorted(running, rank, side="right"))
        rank -= int(running[digit - 1]) if digit else 0
        prefix = (prefix << np.uint64(16)) | np.uint64(digit)
    sign = np.uint64(1 << 63)
    bits = prefix ^ sign if prefix & sign else ~prefix
    return float(np.array([bits], np.uint64).view(np.float64)[0])


def _sortable(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
    """Floats as integers of the same order; NaN left out."""
    bits = (scores[~np.isnan(scores)] + 0.0).view(np.uint64)
    sign = np.uint64(1 << 63)
    return np.where(bits & sign, ~bits, bits | sign)


def decide(
    work: Work, folders: Folders, thresholds: Mapping[str, Mapping[str, float]], *, settled: frozenset[str]
) -> Copies:
    """Write the column `why` of every training file that is not in `settled`; returns some of the copies found."""
    whys: dict[str, npt.NDArray[np.uint8]] = {}
    for part in work.parts:
        if part.split == "train":
            if part.stem in settled:
                whys[part.stem] = np.array(read(folders[part.domain], part.stem, "why"))
            else:
                whys[part.stem] = _judged(work, part, folders[part.domain], thresholds.get(part.domain, {}))
    # What was decided comes before what is new, whatever the order of names.
    order = sorted(work.parts, key=lambda part: (part.split == "train", part.stem not in settled))
    copies: Copies = []
    if work.deduplicate != "none":
        copies = _drop_copies(order, folders, whys, settled, EXACT, 1)
    if work.deduplicate == "near":
        copies += _drop_copies(order, folders, whys, settled, NEAR, BANDS)
    for part in work.parts:
        if part.split == "train" and part.stem not in settled:
            _write(folders[part.domain], part.stem, whys[part.stem])
    return copies


def _judged(work: Work, part: Part, folder: Path, limits: Mapping[str, float]) -> npt.NDArray[np.uint8]:
    """Everything but copies."""
    why = np.where(read(folder, part.stem, "size") == 0, EMPTY, KEPT).astype(np.uint8)
    if work.benchmarks:
        why[(why == KEPT) & (read(folder, part.stem, "benchmark") > 0)] = BENCHMARK
    for item in work.filters_of(part.domain):
        below = read(folder, part.stem, item.column) < limits[item.column]
        why[(why == KEPT) & below] = FILTERS + item.place
    return why


def _drop_copies(
    order: Sequence[Part],
    folders: Folders,
    whys: Mapping[str, npt.NDArray[np.uint8]],
    settled: frozenset[str],
    reason: int,
    columns: int,
) -> Copies:
    lengths = [len(read(folders[part.domain], part.stem, "number")) for part in order]
    starts = np.concatenate([[0], np.cumsum(lengths)])

    def fingerprints(column: int) -> Iterator[Pairs]:
        for part, start, length in zip(order, starts, lengths, strict=False):
            folder = folders[part.domain]
            held = part.split == "heldout"
            alive = read(folder, part.stem, "size") > 0 if held else whys[part.stem] == KEPT
            found = read(folder, part.stem, "hash" if reason == EXACT else "bands")
            values = found if reason == EXACT else found[:, column]
            yield np.asarray(values)[alive], (np.arange(start, start + length))[alive]

    copies, originals = first_of_each(columns, fingerprints, count=int(starts[-1]))
    examples: Copies = []
    homes = np.searchsorted(starts, copies, side="right") - 1
    for copy, original, home in zip(copies.tolist(), originals.tolist(), homes.tolist(), strict=True):
        part = order[home]
        if part.split == "heldout" or part.stem in settled:
            continue  # held-out text stays as it is, and so does what was decided before
        whys[part.stem][copy - int(starts[home])] = reason
        if len(examples) < 200:
            first = int(np.searchsorted(starts, original, side="right")) - 1
            examples.append((part, copy - int(starts[home]), order[first], original - int(starts[first])))
    return examples


def _write(folder: Path, stem: str, why: npt.NDArray[np.uint8]) -> None:
    with ColumnWriter(folder, stem, ["why"]) as writer:
        writer.add({"why": why})
        writer.finish()
