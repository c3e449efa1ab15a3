"""What a plan takes everything outside its experts from: the base, or the mean of several checkpoints made once more.

The mean is computed here by a plain interpreter that shares no code with the executor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.branches import branch_key
from prismoe.checkpoint.tensorfile import DTYPES
from prismoe.plan import Plan

__all__ = ["outside", "rounded_mean"]

Array = npt.NDArray[Any]
_BLOCK = 1 << 20  # numbers: bounds the float64 copies


def outside(sources: Checkpoint, plan: Plan) -> Checkpoint:
    """The dense checkpoint that tensors outside the experts have to equal: a view, nothing is written."""
    return sources.donors[0] if plan.rest == (0,) else _Averaged(sources, plan.rest)


class _Averaged(Checkpoint):
    """The base, but every tensor is the mean over checkpoints `numbers`; what one of them lacks is not there."""

    def __init__(self, sources: Checkpoint, numbers: Sequence[int]) -> None:
        base = sources.donors[0]
        self.folder, self.config = base.folder, base.config
        self._sources, self._numbers, self._maps = sources, tuple(numbers), {}
        self.tensors = {
            name: info
            for name, info in base.tensors.items()
            if all(branch_key(number, name) in sources.tensors for number in numbers)
        }

    def array(self, key: str, *, rows: int | None = None) -> Array:
        return rounded_mean([self._sources.array(branch_key(number, key), rows=rows) for number in self._numbers])


def rounded_mean(arrays: Sequence[Array]) -> Array:
    """Σ/n in float64, rounded once to the dtype of `arrays`."""
    made = np.empty(arrays[0].shape, arrays[0].dtype)
    flat = made.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        parts = [array.reshape(-1)[start : start + _BLOCK].astype(np.float64) for array in arrays]
        flat[start : start + _BLOCK] = _nearest(sum(parts[1:], parts[0]) / len(parts), made.dtype)
    return made


def _nearest(wide: Array, dtype: npt.DTypeLike) -> Array:
    """float64 in bfloat16's steps (8 bits, exponents from -126 on) before it is stored; NumPy knows the others."""
    if np.dtype(dtype) == DTYPES["BF16"]:
        step = np.ldexp(1.0, np.maximum(np.frexp(wide)[1], -125) - 8)
        wide = np.copysign(np.rint(wide / step) * step, wide)
    return wide.astype(dtype)
