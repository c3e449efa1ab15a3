"""Every random number that ends up in a weight, each from its own place in a Philox stream.

Philox has a 256-bit counter and jumps to any place at no cost: key (seed, layer); the last counter word says what is
drawn (0 whole tensors, 1 what methods draw, 2 rows of experts). So any worker draws any row, and no two overlap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["row_normals", "tensor_normals"]

EXPERT_ROWS = 2


def tensor_normals(key: tuple[int, int], shape: tuple[int, ...], *, repeat: int = 1) -> npt.NDArray[np.float64]:
    """N(0, 1) of `shape`; with `repeat`, every drawn row stands there that many times in a row."""
    generator = np.random.Generator(np.random.Philox(key=key))
    if repeat == 1:
        return generator.standard_normal(shape)
    return np.repeat(generator.standard_normal((shape[0] // repeat, *shape[1:])), repeat, axis=0)


def row_normals(key: tuple[int, int], *, stream: int, row: int, count: int) -> npt.NDArray[np.float32]:
    """[count] N(0, 1) of row `row` of the tensor numbered `stream`."""
    philox = np.random.Philox(key=key, counter=[0, row, stream, EXPERT_ROWS])
    return np.random.Generator(philox).standard_normal(count, dtype=np.float32)
