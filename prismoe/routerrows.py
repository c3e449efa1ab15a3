"""Directions become router rows: what all experts share says nothing, and the length sets how sure the router is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError
from prismoe.tensorfile import read_header

__all__ = ["as_router_rows", "read_rows"]


def as_router_rows(directions_ED: npt.NDArray[Any], *, std: float) -> npt.NDArray[np.float32]:
    """[E, D] directions less their mean, each as long as a row drawn from N(0, std²); rows without direction are zero.

    Subtracting one vector from all rows changes no choice and no gate.
    """
    wide = directions_ED.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1).max()
    if len(wide) > 1:
        wide = wide - wide.mean(axis=0)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    # Rounding leaves dust where all rows were the same; it is not a direction.
    there = norms > 1e-6 * lengths
    unit = np.divide(wide, norms, out=np.zeros_like(wide), where=there)
    rows: npt.NDArray[np.float32] = (unit * (std * math.sqrt(wide.shape[1]))).astype(np.float32)
    return rows


def read_rows(path: str | Path, name: str, *, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Tensor `name` of a .safetensors file, float32 of `shape`.

    Raises:
        InputError: no such file or tensor, another shape, or numbers that are not finite.
    """
    path = Path(path)
    infos, _ = read_header(path)
    info = infos.get(name)
    where = f"{path}: {name}"
    if info is None or info.dtype != "F32" or info.shape != shape:
        found = "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"
        raise InputError(found, where=where, needed=f"F32 {list(shape)}")
    rows = np.fromfile(path, np.dtype("<f4"), count=shape[0] * shape[1], offset=info.start).reshape(shape)
    if not np.isfinite(rows).all():
        raise InputError("holds numbers that are not finite", where=where)
    return rows.astype(np.float32)
