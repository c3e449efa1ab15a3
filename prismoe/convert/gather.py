"""Runs recipes: any run of bytes of any output tensor is made on its own, so memory never depends on tensor sizes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.tensorfile import DTYPES, ITEM_BYTES
from prismoe.convert.layout import Piece, lay_out, recipe_tensor
from prismoe.errors import InputError
from prismoe.layerplan.draws import row_normals, tensor_normals
from prismoe.recipe import Copy, Draws, Fill, Mean, Recipe, Take, Weave, sources

__all__ = ["Gatherer", "draw", "execute"]

Array = npt.NDArray[Any]

BLOCK = 1 << 15  # numbers averaged at a time
ROWS = 64  # rows gathered at a time: source and result of a column gather stay in the second-level cache
INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}


def draw(fill: Fill) -> Array:
    """The numbers of a fill in its dtype: drawn in float64 by Philox under the recipe's key, rounded once."""
    if fill.rows is not None:
        numbers: Array = fill.rows
    elif fill.std == 0.0:
        numbers = np.zeros(fill.shape)
    else:
        numbers = tensor_normals(fill.key, fill.shape, repeat=fill.repeat) * fill.std
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(numbers.astype(DTYPES[fill.dtype]))
    if not _finite(_bits(made), fill.dtype):
        raise InputError("numbers that are not finite", where=f"fill of {fill.shape} as {fill.dtype}")
    return made


def execute(checkpoint: Checkpoint, recipe: Recipe) -> Array:
    """The whole tensor that `recipe` makes, in memory; the bytes are those that `convert` writes.

    Raises:
        InputError: the source lacks what the recipe asks for, or holds NaN or infinity.
    """
    dtype, shape = recipe_tensor(recipe, checkpoint.tensors, key="tensor")
    (shard,) = lay_out({"tensor": recipe}, checkpoint.tensors, max_shard_bytes=1 << 62)
    data = bytearray(shard.nbytes - len(shard.header))
    with Gatherer.reading(checkpoint) as gatherer:
        for piece in shard.pieces:
            start = piece.start - len(shard.header)
            gatherer.fill(piece, 0, piece.nbytes, memoryview(data)[start : start + piece.nbytes])
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


class Gatherer:
    """Fills byte windows of pieces from a checkpoint. Safe to use from several threads at once."""

    def __init__(self, checkpoint: Checkpoint, files: dict[Path, int]) -> None:
        self._checkpoint = checkpoint
        self._files = files
        self._draw = lru_cache(maxsize=32)(draw)
        self._index = lru_cache(maxsize=64)(_row_index)

    @classmethod
    @contextmanager
    def reading(cls, checkpoint: Checkpoint) -> Iterator[Gatherer]:
        """A gatherer with the checkpoint's shards open."""
        files: dict[Path, int] = {}
        try:
            for path in sorted({info.file for info in checkpoint.tensors.values()}):
                checkpoint.check(path)
                files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            yield cls(checkpoint, files)
        except OSError as error:
            raise InputError(f"cannot read: {error.strerror}", where=str(checkpoint.folder)) from error
        finally:
            for handle in files.values():
                os.close(handle)

    def fill(self, piece: Piece, low: int, high: int, out: memoryview) -> None:
        """Write bytes [low, high) of `piece` into `out` (of that length; both are multiples of the item size).

        Raises:
            InputError: NaN or infinity in the source, naming its tensor; or the source file became shorter.
        """
        recipe = piece.recipe
        if isinstance(recipe, Fill):
            if recipe.rows is None and recipe.std == 0.0:
                np.frombuffer(out, np.uint8)[:] = 0
            else:
                np.frombuffer(out, np.uint8)[:] = self._draw(recipe).reshape(-1).view(np.uint8)[low:high]
            return
        if isinstance(recipe, Copy):
            self._read(recipe.source, low, out)
        elif isinstance(recipe, Mean):
            self._average(recipe, low // ITEM_BYTES[piece.dtype], np.frombuffer(out, DTYPES[piece.dtype]))
        else:
            self._window(piece, recipe, low, high, np.frombuffer(out, _unsigned(piece.dtype)))
        changed = isinstance(recipe, Weave | Mean) or (isinstance(recipe, Take) and recipe.changes)
        looked_at = piece.check or changed
        if looked_at and not _finite(np.frombuffer(out, _unsigned(piece.dtype)), piece.dtype):
            raise InputError(
                "holds NaN or infinity" + (_change_text(recipe) if isinstance(recipe, Take) and changed else ""),
                where=self._place(recipe),
                needed="finite weights",
                hint="the checkpoint is damaged; fetch it again",
            )

    def _read(self, source: str, low: int, out: memoryview) -> None:
        info = self._checkpoint.tensors[source]
        done = 0
        while done < len(out):
            got = os.preadv(self._files[info.file], [out[done:]], info.start + low + done)
            if not got:
                raise InputError("the file became shorter while it was read", where=f"{info.file}: {source}")
            done += got

    def _place(self, recipe: Copy | Take | Weave | Mean) -> str:
        """The tensor to name in a complaint about bytes that were just read; of several, the first that is damaged."""
        names = sources(recipe)
        damaged = (name for name in names if len(names) > 1 and not np.isfinite(self._checkpoint.array(name)).all())
        name = next(damaged, names[0])
        return f"{self._checkpoint.tensors[name].file}: {name}"

    def _average(self, mean: Mean, first: int, out: Array) -> None:
        """Numbers [first, first + len(out)) of a mean, a block at a time: wide copies stay in the cache."""
        rows = slice(mean.first, mean.first + mean.count)
        stored = [self._checkpoint.array(name)[rows].reshape(-1)[first:] for name in mean.sources]
        for start in range(0, len(out), BLOCK):
            block = out[start : start + BLOCK]
            total = stored[0][start : start + len(block)].astype(np.float64)  # not from 0: the mean of -0 is -0
            for numbers in stored[1:]:
                total += numbers[start : start + len(block)].astype(np.float64)
            total /= len(stored)
            block[...] = _rounded_once(total, block.dtype)

    def _window(self, piece: Piece, recipe: Take | Weave, low: int, high: int, out: Array) -> None:
        """Whole rows go straight into `out`; a row cut by the window's edge is made apart and cut."""
        # Experts in one tensor are gathered row by row: a whole expert may be larger than any window.
        width = piece.shape[-1] if len(piece.shape) > 2 else math.prod(piece.shape[1:])
        item = ITEM_BYTES[piece.dtype]
        first, last = low // item, high // item
        row = first // width
        done = 0
        while done < out.size:
            skip = first + done - row * width
            if skip == 0 and out.size - done >= width:
                count = (last - first - done) // width
                self._rows(recipe, row, out[done : done + count * width].reshape(count, width))
                done += count * width
                row += count
            else:
                one = np.empty((1, width), out.dtype)
                self._rows(recipe, row, one)
                part = one[0, skip : skip + out.size - done]
                out[done : done + part.size] = part
                done += part.size
                row += 1

    def _rows(self, recipe: Take | Weave, row: int, out: Array) -> None:
        """Rows [row, row + len(out)) of the tensor that is made."""
        if isinstance(recipe, Take):
            self._taken(recipe, row, out)
        elif recipe.axis:
            self._woven_columns(recipe, row, out)
        else:
            self._woven_rows(recipe, row, out)

    def _woven_columns(self, weave: Weave, row: int, out: Array) -> None:
        order = weave.order.astype(np.intp)
        for start in range(0, len(out), ROWS):
            block = out[start : start + ROWS]
            beside = np.empty((len(block), len(order)), block.dtype)
            place = 0
            for strand in weave.strands:
                stored = self._checkpoint.array(strand.source)
                first = strand.first + row + start
                part = beside[:, place : place + strand.count]
                part[...] = _bits(stored).reshape(-1, stored.shape[-1])[first : first + len(block), : strand.count]
                if strand.factor != 1.0:
                    _scale(part.view(stored.dtype), strand.factor)
                place += strand.count
            block[:, : len(order)] = np.take(beside, order, axis=1, mode="clip")
            block[:, len(order) :] = 0

    def _woven_rows(self, weave: Weave, row: int, out: Array) -> None:
        wanted = weave.order[row : row + len(out)]
        out[len(wanted) :] = 0
        place = 0
        for strand in weave.strands:
            (at,) = np.nonzero((wanted >= place) & (wanted < place + strand.count))
            if at.size:
                stored = self._checkpoint.array(strand.source)
                rows = _bits(stored).reshape(-1, stored.shape[-1])
                block = rows[strand.first + wanted[at] - place]
                if strand.factor != 1.0:
                    _scale(block.view(stored.dtype), strand.factor)
                out[at] = block
            place += strand.count

    def _taken(self, take: Take, row: int, out: Array) -> None:
        index = self._index(take)
        stored = self._checkpoint.array(take.source)
        if stored.ndim > 2:
            inside = math.prod(stored.shape[1:-1])
            place, rest = np.divmod(np.arange(row, row + len(out)), inside)
            stored, index, row = stored.reshape(-1, stored.shape[-1]), index[place] * inside + rest, 0
        bits = _bits(stored).reshape(len(stored), -1)
        step = ROWS if take.axis or take.changes else len(out)
        for start in range(0, len(out), step):
            block = out[start : start + step]
            at = row + start
            # "clip" lets NumPy write straight into `out`; the index was checked when the output was laid out.
            if take.axis:
                np.take(bits[at : at + len(block)], index, axis=1, out=block, mode="clip")
            else:
                np.take(bits, index[at : at + len(block)], axis=0, out=block, mode="clip")
            if take.draws is not None:
                _draw_rows(block.view(stored.dtype), take, take.draws, at)
            elif take.factor != 1.0:
                _scale(block.view(stored.dtype), take.factor)
            if take.axis and take.pad:
                block[:, len(take.index) :] = 0


def _row_index(take: Take) -> npt.NDArray[np.intp]:
    """The index in the type that `np.take` uses; zero columns first take column 0 and are cleared afterwards."""
    index = take.index.astype(np.intp)
    return np.concatenate([index, np.zeros(take.pad, np.intp)]) if take.axis and take.pad else index


def _scale(block: Array, factor: float) -> None:
    """Multiply in float32 (float64 for float64) and round once to the stored dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = block.astype(np.float64 if block.dtype == np.float64 else np.float32)
        block[...] = np.multiply(wide, factor, dtype=wide.dtype).astype(block.dtype)


def _rounded_once(wide: npt.NDArray[np.float64], dtype: npt.DTypeLike) -> Array:
    """float64 as `dtype`, to the nearest, ties to even. ml_dtypes goes to bfloat16 by way of float32 and rounds twice;
    rounding to odd on that way (an inexact number keeps a set last bit) leaves the second rounding all it needs.
    """
    if np.dtype(dtype) != DTYPES["BF16"]:
        return wide.astype(dtype)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    bits = narrow.view(np.uint32)
    bits -= np.abs(narrow) > np.abs(wide)  # towards zero
    bits |= narrow != wide
    return narrow.astype(dtype)


def _draw_rows(block: Array, take: Take, draws: Draws, first: int) -> None:
    """Put the drawn numbers into rows [first, first + len(block)), then the factor; round once to the stored dtype."""
    exact: Any = np.float64 if block.dtype == np.float64 else np.float32
    factor, width = take.factor, len(take.index) if take.axis else block.shape[1]
    redrawn = np.isin(np.arange(first, first + len(block)), draws.slots) if not take.axis else None
    for i, line in enumerate(block):
        anew = draws.slots if redrawn is None else slice(None) if redrawn[i] else np.empty(0, np.intp)
        if redrawn is not None and not redrawn[i] and not draws.noise:
            if factor != 1.0:
                _scale(line, factor)
            continue
        normals = row_normals(draws.key, stream=draws.stream, row=first + i, count=width).astype(exact)
        if draws.noise or factor != 1.0:
            wide = line[:width].astype(exact) + normals * exact(draws.noise)
            wide[anew] = draws.mean + normals[anew] * exact(draws.std)
            line[:width] = (wide * exact(factor)).astype(block.dtype)
        else:  # what is not drawn keeps every bit
            line[anew] = (draws.mean + normals[anew] * exact(draws.std)).astype(block.dtype)


def _change_text(take: Take) -> str:
    return f" (after the factor {take.factor:g})" if take.factor != 1.0 else " (after noise or redrawn neurons)"


def _unsigned(dtype: str) -> npt.DTypeLike:
    return np.dtype(f"u{ITEM_BYTES[dtype]}")


def _bits(array: Array) -> Array:
    return array.view(f"u{array.itemsize}")


def _finite(bits: Array, dtype: str) -> bool:
    """Whether no number is NaN or infinite, from two maxima and without a temporary copy.

    As signed integers the positive numbers are ordered and negative ones lie below; as unsigned integers the
    negative ones come last, ordered by magnitude. So each maximum need only stay below the bits of ±infinity.
    """
    infinity = INFINITY[dtype]
    sign = 1 << (8 * bits.itemsize - 1)
    return bits.size == 0 or (
        int(bits.view(f"i{bits.itemsize}").max()) < infinity and int(bits.max()) < infinity | sign
    )
