"""One flat array that lies in several files: what a slice touches is mapped, the rest is never opened."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FlatFiles"]

Ids = npt.NDArray[np.unsignedinteger[Any]]


class FlatFiles:
    """Reads like a one-dimensional array: `len`, slices, integers, arrays of integers, `np.asarray`.

    A slice within one file is a view of it; one that crosses files is a copy. Files are mapped when first read.

    Args:
        files: in order.
        sizes: elements of each file.
        dtype: of all.
    """

    def __init__(self, files: Sequence[Path], sizes: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.dtype, self._files = dtype, tuple(files)
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
        self._edges: list[int] = self._starts.tolist()  # bisecting a list costs a tenth of searching an array
        self._maps: list[Ids | None] = [None] * len(self._files)
        self.shape: tuple[int, ...] = (int(self._starts[-1]),)
        self.size, self.ndim = self.shape[0], 1

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            begin, end, step = index.indices(self.size)
            if step != 1:
                return self[np.arange(begin, end, step)]
            if end <= begin:
                return np.empty(0, self.dtype)
            edges = self._edges
            first = bisect_right(edges, begin) - 1
            if end <= edges[first + 1]:
                found = self._maps[first]
                offset = edges[first]
                return (self._map(first) if found is None else found)[begin - offset : end - offset]
            last = bisect_left(edges, end)
            numbers = [number for number in range(first, last) if edges[number] < edges[number + 1]]
            return np.concatenate([self._map(n)[max(begin - edges[n], 0) : end - edges[n]] for n in numbers])
        wanted = np.asarray(index)
        if wanted.dtype == np.bool_:
            wanted = np.flatnonzero(wanted)
        flat = np.where(wanted < 0, wanted + self.size, wanted).reshape(-1)
        if len(flat) and (flat.min() < 0 or flat.max() >= self.size):
            raise IndexError(f"index out of {self.size}")
        whose: npt.NDArray[np.int64] = np.searchsorted(self._starts, flat, side="right").astype(np.int64) - 1
        found = np.empty(len(flat), self.dtype)
        for number in np.unique(whose).tolist():
            here = whose == number
            found[here] = self._map(number)[flat[here] - self._starts[number]]
        return found.reshape(wanted.shape)[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self[:], dtype)

    def tolist(self) -> list[int]:
        """Every element; for small ones."""
        return np.asarray(self).tolist()  # type: ignore[no-any-return]

    def view(self, kind: Any = None) -> FlatFiles:
        """Itself, where a memory map would be viewed as a plain array."""
        return self

    def _map(self, number: int) -> Ids:
        found = self._maps[number]
        if found is None:
            found = np.memmap(self._files[number], self.dtype, mode="r").view(np.ndarray)
            self._maps[number] = found
        return found
