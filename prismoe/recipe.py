"""Recipes: how the bytes of one output tensor are made. Data only; `convert.py` interprets them.

`Copy` moves a source tensor unchanged, `Take` gathers rows or columns of one, `Fill` writes numbers that
have no source, and `Stack` lays several recipes one after the other (a fused `[E, 2W, D]` expert tensor is a
stack of takes). `Weave` is the way back: rows or columns of many tensors put in one order. `Mean` averages several
tensors into one. The output dtype of all but `Fill` is that of the source tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Copy", "Draws", "Fill", "IntArray", "Mean", "Recipe", "Stack", "Strand", "Take", "Weave", "sources"]

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


@dataclass(frozen=True, eq=False)
class Strand:
    """A block of tensor `source` seen as rows of its last axis: from row `first` on, its first `count` rows or columns.

    Whether `count` is of rows or of columns is the weave's axis to say. `factor` as in `Take`.
    """

    source: str
    first: int
    count: int
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Weave:
    """A matrix of `shape`: `strands` side by side along `axis`, reordered, then zeros along it up to `shape`.

    Place i of the result is place order[i] of the strands laid side by side; each of them is used once.
    """

    shape: tuple[int, int]
    axis: int
    strands: tuple[Strand, ...]
    order: IntArray


@dataclass(frozen=True, eq=False)
class Mean:
    """Rows [first, first + count) of tensors `sources`, which have one shape and dtype, averaged.

    Summed in float64 in the order given, divided, and rounded once to the stored dtype: the mean of equal numbers is
    that number.
    """

    sources: tuple[str, ...]
    first: int
    count: int


Recipe = Copy | Take | Fill | Stack | Weave | Mean


def sources(recipe: Copy | Take | Fill | Weave | Mean) -> tuple[str, ...]:
    """The tensors that a recipe reads."""
    if isinstance(recipe, Fill):
        return ()
    if isinstance(recipe, Mean):
        return recipe.sources
    return tuple(strand.source for strand in recipe.strands) if isinstance(recipe, Weave) else (recipe.source,)
