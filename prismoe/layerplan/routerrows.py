"""Directions become router rows: what all experts share says nothing, and the length sets how sure the router is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint.tensorfile import read_header
from prismoe.errors import InputError

__all__ = ["as_router_rows", "read_rows"]


def as_router_rows(directions_ED: npt.NDArray[Any], *, std: float) -> npt.NDArray[np.float32]:
    """[E, D] unit directions less their mean, with the mean square of rows drawn from N(0, std²).

    A token then prefers the direction that it is nearest to by cosine: subtracting one vector from all rows and one
    common length change no choice.
    """
    wide = directions_ED.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)
    if len(unit) > 1:
        unit -= unit.mean(axis=0)
    size = math.sqrt(float((unit**2).mean()))
    # Rounding leaves dust where all directions are the same; it is none.
    rows: npt.NDArray[np.float32] = (unit * (std / size if size > 1e-7 else 0.0)).astype(np.float32)
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
