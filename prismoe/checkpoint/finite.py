"""Weights that are not finite, found and named before anything is computed with them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prismoe.checkpoint import FFN, Checkpoint
from prismoe.errors import InputError

__all__ = ["finite_ffn", "require_finite"]


def require_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Read the tensors `names` once.

    Raises:
        InputError: one holds NaN or infinity; names it and its file.
    """
    for name in names:
        array = checkpoint.array(name)
        with np.errstate(invalid="ignore"):
            sound = not array.size or (np.isfinite(array.max()) and np.isfinite(array.min()))
        if not sound:
            raise InputError(
                "holds NaN or infinity",
                where=f"{checkpoint.tensors[name].file}: {name}",
                needed="finite weights",
                hint="the checkpoint is damaged; fetch it again",
            )


def finite_ffn(checkpoint: Checkpoint, layer: int) -> FFN:
    """The feed-forward weights of one layer.

    Raises:
        InputError: a weight is not finite.
    """
    names = (f"model.layers.{layer}.mlp.{matrix}_proj.weight" for matrix in ("gate", "up", "down"))
    require_finite(checkpoint, sorted({checkpoint.places[name].source for name in names}))
    return checkpoint.ffn(layer)
