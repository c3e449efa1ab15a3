"""Products of many rows with few centres in float32: memory-bound, and the same bits whatever the thread count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["Product", "Rows", "thin_product"]

Rows = npt.NDArray[np.float32]
Product = Callable[[Rows, Rows], Rows]  # ([N, D], [K, D]) → [N, K]

_LARGE = 1 << 20  # elements from which importing torch for its faster product pays

_lock = threading.Lock()
_users, _threads = 0, 0  # who is inside, and torch's thread count before the first


@contextmanager
def thin_product(*, size: int) -> Iterator[Product]:
    """Yields a function from rows [N, D] and centres [K, D], contiguous float32, to rows · centresᵀ [N, K].

    From 2²⁰ elements (`size`) it is oneDNN's, through torch held to one thread: 13 ms where NumPy's BLAS took 25 – 36
    and torch's own matmul 37 (11008 × 4096 with 16, one Zen 5 core), close to reading the rows once. Without torch, or
    if the numbers of that operator are off, it is NumPy's.
    """
    global _users, _threads
    if size < _LARGE:
        yield _numpy
        return
    try:
        import torch
    except ImportError:
        yield _numpy
        return
    with _lock:
        if not _users:
            _threads = torch.get_num_threads()
        _users += 1
        torch.set_num_threads(1)
    try:
        yield _fastest()
    finally:
        with _lock:
            _users -= 1
            if not _users:
                torch.set_num_threads(_threads)


def _numpy(rows: Rows, centres: Rows) -> Rows:
    """One dot product per element: a matrix product of NumPy's BLAS gives other bits with other thread counts."""
    found = np.zeros((len(rows), len(centres)), np.float32)
    for at in range(0, rows.shape[1], 8192):  # longer ones are cut among threads, too
        found += np.vecdot(rows[:, None, at : at + 8192], centres[None, :, at : at + 8192])
    return found


@cache
def _fastest() -> Product:
    """oneDNN's linear layer, if this torch has it and it computes in float32."""
    import torch

    def onednn(rows: Rows, centres: Rows) -> Rows:
        linear = torch.ops.mkldnn._linear_pointwise
        found: Rows = linear(torch.from_numpy(rows), torch.from_numpy(centres), None, "none", [], "").numpy()
        return found

    generator = np.random.default_rng(0)
    rows = generator.standard_normal((64, 1024), dtype=np.float32)
    centres = generator.standard_normal((8, 1024), dtype=np.float32)
    exact = rows.astype(np.float64) @ centres.T.astype(np.float64)
    try:
        error = np.abs(onednn(rows, centres) - exact).max() / np.abs(exact).max()
    except (AttributeError, RuntimeError, NotImplementedError):  # built without oneDNN, or the operator moved
        return _numpy
    return onednn if error < 1e-5 else _numpy
