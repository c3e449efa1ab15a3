"""Recipes: how the bytes of one output tensor are made. Data only; `convert.py` interprets them.

`Copy` moves a source tensor unchanged, `Take` gathers rows or columns of one, `Fill` writes numbers that
have no source, and `Stack` lays several recipes one after the other (a fused `[E, 2W, D]` expert tensor is a
stack of takes). The output dtype of `Copy` and `Take` is that of the source tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Copy", "Draws", "Fill", "IntArray", "Recipe", "Stack", "Take"]

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Copy:
    """The bytes of tensor `source`, untouched."""

    source: str


@dataclass(frozen=True, eq=False)
class Draws:
    """Numbers of a `Take` that are drawn: N(mean, std²) at `slots` of the gathered axis, N(0, noise²) added elsewhere.

    Row r of the result takes its numbers in order from Philox `key` at counter (0, r, stream, 2), one for each column.
    """

    key: tuple[int, int]
    stream: int
    slots: IntArray
    mean: float = 0.0
    std: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, eq=False)
class Take:
    """`source` gathered along `axis` (0 rows, 1 columns) at `index`, times `factor`, then `pad` zero slots along it.

    `factor` is applied once, in float32, and rounded to the source dtype; 1.0 leaves every bit as it was. `draws` come
    before the factor.
    """

    source: str
    axis: int
    index: IntArray
    factor: float = 1.0
    pad: int = 0
    draws: Draws | None = None

    @property
    def changes(self) -> bool:
        """Whether any number that is gathered becomes another."""
        return self.factor != 1.0 or self.draws is not None


@dataclass(frozen=True, eq=False)
class Fill:
    """Numbers without a source tensor, of `shape`, stored as `dtype` (a safetensors name, e.g. "BF16").

    `rows` holds them explicitly; otherwise they are drawn from N(0, std²) by Philox with `key`
    (so any worker can draw them), every row `repeat` times in a row, and `std=0` means zeros.
    """

    shape: tuple[int, ...]
    dtype: str
    std: float = 0.0
    key: tuple[int, int] = (0, 0)
    repeat: int = 1
    rows: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Stack:
    """`parts` laid one after the other in memory, seen as one tensor of `shape`."""

    shape: tuple[int, ...]
    parts: tuple[Copy | Take | Fill, ...]


Recipe = Copy | Take | Fill | Stack
