"""Benchmark texts that must not be trained on: every run of 13 words of them, and which documents have one in common.

13 words in a row as in GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C); words are `Keys`, so case, punctuation
and the value of numbers make no difference. All strings of one benchmark item are read as one text, in their order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.words import Batch, ngrams, segments
from prismoe.errors import InputError

__all__ = ["WORDS", "Benchmarks"]

WORDS, MAX_NUMBERS = 13, 4
_BITS = 22  # a table of four million marks answers most questions before the search
SUFFIXES = (".jsonl", ".json", ".txt")


class Benchmarks:
    """The 13-word runs of some files: 10 bytes for each, and 4 MB."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.names = tuple(path.name for path in files)
        found = [_runs(path) for path in files]
        runs = np.concatenate([*found, np.zeros(0, np.uint64)])
        owners = np.repeat(np.arange(len(found), dtype=np.uint16), [len(part) for part in found])
        self._runs, first = np.unique(runs, return_index=True)
        self._owners = owners[first]
        self._marks = np.zeros(1 << _BITS, bool)
        self._marks[self._runs >> np.uint64(64 - _BITS)] = True

    def find(self, batch: Batch) -> npt.NDArray[np.uint16]:
        """[N]: 1 + the number of the first file that has a run in common with the text, 0 where none has."""
        result = np.zeros(len(batch), np.uint16)
        runs, ends = ngrams(batch.keys.hashes, batch.keys.ends, WORDS)
        starts, filled = segments(ends)
        if not len(starts) or not len(self._runs):
            return result
        owners = np.full(len(runs), len(self.names), np.uint16)
        maybe = np.flatnonzero(self._marks[runs >> np.uint64(64 - _BITS)])
        places = np.minimum(np.searchsorted(self._runs, runs[maybe]), len(self._runs) - 1)
        hit = self._runs[places] == runs[maybe]
        owners[maybe[hit]] = self._owners[places[hit]]
        first = np.minimum.reduceat(owners, starts)
        result[filled] = np.where(first < len(self.names), first + 1, 0)
        return result


def _runs(path: Path) -> npt.NDArray[np.uint64]:
    if not path.name.endswith(SUFFIXES):
        raise InputError("not a kind of benchmark file that is read", where=str(path), needed=" ".join(SUFFIXES))
    parts, texts, size = [], [], 0
    for text in _items(path):
        texts.append(text)
        size += len(text)
        if size > 1 << 20:
            parts.append(_of(texts))
            texts, size = [], 0
    parts.append(_of(texts))
    return np.unique(np.concatenate(parts))


def _of(texts: list[str]) -> npt.NDArray[np.uint64]:
    keys = Batch(texts).keys
    runs, _ = ngrams(keys.hashes, keys.ends, WORDS)
    # Every number is one key: a run of little else would match any table.
    numbers = np.concatenate([[0], np.cumsum(keys.hashes == Batch(["0"]).keys.hashes[0])])
    starts = np.concatenate([[0], keys.ends[:-1]])
    places = [np.arange(a, b - WORDS + 1) for a, b in zip(starts, keys.ends, strict=True)]
    first = np.concatenate([*places, np.zeros(0, np.int64)]).astype(np.int64)
    few: npt.NDArray[np.bool_] = numbers[first + WORDS] - numbers[first] <= MAX_NUMBERS
    return runs[few]


def _items(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
            return
        with path.open("rb") as file:
            lines = enumerate(file, start=1) if path.suffix == ".jsonl" else [(1, file.read())]
            for number, line in lines:
                if line.strip():
                    try:
                        yield " ".join(_strings(json.loads(line)))
                    except (ValueError, RecursionError) as error:
                        raise InputError(f"invalid JSON ({error})", where=f"{path}:{number}") from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8", where=str(path)) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
