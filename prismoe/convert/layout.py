"""Where every output byte goes, decided before the first one moves: recipes become shards of pieces.

A piece is a run of bytes of one output file made by one `Copy`, `Take`, `Fill`, `Weave` or `Mean`. All checks on
recipes happen here, on shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prismoe.checkpoint.tensorfile import ITEM_BYTES, TensorInfo, header_bytes, tensor_bytes
from prismoe.errors import InputError, UsageError
from prismoe.recipe import Copy, Fill, Mean, Recipe, Take, Weave, sources

__all__ = ["Piece", "Shard", "index_json", "lay_out", "recipe_tensor"]

DATA_ALIGN = 64  # a reader that maps the file then finds every tensor on its natural boundary

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, eq=False)
class Piece:
    """`nbytes` bytes at `start` of the output file, part of tensor `key`, `shape` and `dtype` as stored.

    `check` asks the executor to look for NaN and infinity; it is False where the same source bytes are looked at
    by an earlier piece.
    """

    key: str
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    recipe: Copy | Take | Fill | Weave | Mean
    check: bool = True


@dataclass(frozen=True, eq=False)
class Shard:
    """One output file: its header, then its pieces without a gap. `nbytes` is the size of the file."""

    name: str
    header: bytes
    pieces: tuple[Piece, ...]
    keys: tuple[str, ...]
    nbytes: int


def recipe_tensor(recipe: Recipe, tensors: Tensors, *, key: str) -> tuple[str, tuple[int, ...]]:
    """safetensors dtype name and shape of what `recipe` makes.

    Raises:
        InputError: the source tensor is missing, or rows or columns are asked for that it does not have.
    """
    if isinstance(recipe, Fill):
        if recipe.rows is not None and recipe.rows.shape != recipe.shape:
            raise InputError(f"{recipe.rows.shape} numbers", where=key, needed=str(recipe.shape))
        return recipe.dtype, recipe.shape
    if isinstance(recipe, Copy):
        info = _source(recipe.source, tensors, key)
        return info.dtype, info.shape
    if isinstance(recipe, Take):
        return _take_tensor(recipe, tensors, key)
    if isinstance(recipe, Weave):
        return _woven_tensor(recipe, tensors, key)
    if isinstance(recipe, Mean):
        return _mean_tensor(recipe, tensors, key)
    made = [recipe_tensor(part, tensors, key=key) for part in recipe.parts]
    dtypes = {dtype for dtype, _ in made}
    if len(dtypes) != 1 or sum(math.prod(shape) for _, shape in made) != math.prod(recipe.shape):
        raise InputError(f"stack of {made}", where=key, needed=f"one dtype and together {recipe.shape}")
    return dtypes.pop(), recipe.shape


def _take_tensor(recipe: Take, tensors: Tensors, key: str) -> tuple[str, tuple[int, ...]]:
    info = _source(recipe.source, tensors, key)
    where = f"{key} from {recipe.source}"
    if recipe.axis not in (0, 1) or len(info.shape) <= recipe.axis or (recipe.axis == 1 and len(info.shape) != 2):
        raise InputError(f"axis {recipe.axis} of a tensor of shape {info.shape}", where=where)
    length, index = info.shape[recipe.axis], recipe.index
    if index.ndim != 1 or index.dtype.kind != "i" or (index.size and not 0 <= index.min() <= index.max() < length):
        found = f"{index.min()}..{index.max()}" if index.size and index.dtype.kind == "i" else str(index.dtype)
        raise InputError(f"index {found} of shape {index.shape}", where=where, needed=f"a list within 0..{length - 1}")
    if not math.isfinite(recipe.factor) or recipe.pad < 0:
        raise InputError(f"factor {recipe.factor}, pad {recipe.pad}", where=where, needed="finite, and pad ≥ 0")
    slots = recipe.draws.slots if recipe.draws is not None else index[:0]
    if slots.size and not 0 <= slots.min() <= slots.max() < index.size:
        raise InputError(
            f"draws at {slots.min()}..{slots.max()}", where=where, needed=f"places within 0..{index.size - 1}"
        )
    shape = list(info.shape)
    shape[recipe.axis] = index.size + recipe.pad
    return info.dtype, tuple(shape)


def _woven_tensor(recipe: Weave, tensors: Tensors, key: str) -> tuple[str, tuple[int, ...]]:
    across = recipe.shape[1 - recipe.axis]
    dtypes = set()
    for strand in recipe.strands:
        info = _source(strand.source, tensors, key)
        rows, columns = math.prod(info.shape[:-1]), info.shape[-1]
        down, right = (across, strand.count) if recipe.axis else (strand.count, across)
        fits = 0 <= strand.first <= strand.first + down <= rows
        if not fits or strand.count < 1 or right > columns or (not recipe.axis and right != columns):
            found = f"{down} rows from {strand.first} on and {right} columns of a tensor of shape {list(info.shape)}"
            raise InputError(found, where=f"{key} from {strand.source}")
        if not math.isfinite(strand.factor):
            raise InputError(f"factor {strand.factor}", where=f"{key} from {strand.source}", needed="a finite number")
        dtypes.add(info.dtype)
    count = sum(strand.count for strand in recipe.strands)
    order = recipe.order
    if order.shape != (count,) or not np.array_equal(np.sort(order), np.arange(count)):
        raise InputError(f"order of shape {list(order.shape)}", where=key, needed=f"each of {count} places once")
    if len(dtypes) != 1 or count > recipe.shape[recipe.axis]:
        raise InputError(f"{count} places of {sorted(dtypes)}", where=key, needed=f"one dtype, within {recipe.shape}")
    return dtypes.pop(), recipe.shape


def _mean_tensor(recipe: Mean, tensors: Tensors, key: str) -> tuple[str, tuple[int, ...]]:
    found = {(info.dtype, info.shape) for info in (_source(name, tensors, key) for name in recipe.sources)}
    if len(found) != 1:
        raise InputError(f"mean of {sorted(found)}", where=key, needed="tensors of one dtype and shape")
    dtype, shape = found.pop()
    if not shape or not 0 <= recipe.first < recipe.first + recipe.count <= shape[0]:
        found_rows = f"rows {recipe.first}..{recipe.first + recipe.count - 1} of a tensor of shape {list(shape)}"
        raise InputError(found_rows, where=f"{key} from {recipe.sources[0]}")
    return dtype, (recipe.count, *shape[1:])


def _source(name: str, tensors: Tensors, key: str) -> TensorInfo:
    if name not in tensors:
        raise InputError(f"source tensor {name} is missing", where=key, hint="the checkpoint is not complete")
    return tensors[name]


def lay_out(recipes: Mapping[str, Recipe], tensors: Tensors, *, max_shard_bytes: int) -> tuple[Shard, ...]:
    """Shards of at most `max_shard_bytes` of data (a single larger tensor gets its own), near equal in size.

    Tensors keep the order of `recipes`; inside a shard wider dtypes come first so that all of them lie aligned.

    Raises:
        InputError: see `recipe_tensor`.
        UsageError: `max_shard_bytes` is not positive.
    """
    if max_shard_bytes <= 0:
        raise UsageError(f"{max_shard_bytes}", where="convert.max_shard_bytes", needed="a size in bytes above 0")
    made = {key: recipe_tensor(recipe, tensors, key=key) for key, recipe in recipes.items()}
    groups = _groups({key: tensor_bytes(*tensor) for key, tensor in made.items()}, max_shard_bytes)
    whole: set[str] = set()  # sources of which an earlier piece passes every byte through our hands
    shards = []
    for number, group in enumerate(groups, start=1):
        one = len(groups) == 1
        name = "model.safetensors" if one else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        keys = sorted(group, key=lambda key: -ITEM_BYTES[made[key][0]])
        header = header_bytes(((key, *made[key]) for key in keys), metadata={"format": "pt"}, align=DATA_ALIGN)
        pieces: list[Piece] = []
        end = len(header)
        for key in keys:
            for atom in _atoms(recipes[key], tensors):
                dtype, shape = recipe_tensor(atom, tensors, key=key)
                size = tensor_bytes(dtype, shape)
                check = not whole.issuperset(sources(atom))
                if isinstance(atom, Copy | Take) and _passes_all(atom, tensors):
                    whole.add(atom.source)
                if size:
                    pieces.append(Piece(key, end, size, dtype, shape, atom, check=check))
                end += size
        shards.append(Shard(name, header, tuple(pieces), tuple(keys), end))
    return tuple(shards)


def _passes_all(recipe: Copy | Take, tensors: Tensors) -> bool:
    if isinstance(recipe, Copy):
        return True
    if recipe.draws is not None:
        return False  # a number that is drawn anew hides what stood there
    length = tensors[recipe.source].shape[recipe.axis]
    return recipe.index.size >= length and np.unique(recipe.index).size == length


def _groups(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Consecutive keys in groups of at most `most` bytes, cut near equal shares so that threads finish together."""
    groups: list[list[str]] = []
    left, held, share = sum(sizes.values()), 0, 0.0
    for key, size in sizes.items():
        if not groups or held + size > most or held + size / 2 > share:
            groups.append([])
            held, share = 0, left / max(1, -(-left // most))
        groups[-1].append(key)
        held += size
        left -= size
    return groups


def _atoms(recipe: Recipe, tensors: Tensors) -> Iterator[Copy | Take | Fill | Weave | Mean]:
    """Parts of a stack in order, with every take that moves a whole tensor unchanged turned into a copy."""
    if isinstance(recipe, Copy | Fill | Weave | Mean):
        yield recipe
    elif isinstance(recipe, Take):
        info = tensors[recipe.source]
        length = info.shape[recipe.axis]
        same = not recipe.changes and recipe.index.size == length
        same = same and bool((recipe.index == np.arange(length)).all())
        if recipe.axis == 0:
            yield Copy(recipe.source) if same else replace(recipe, pad=0)
            yield Fill(shape=(recipe.pad, *info.shape[1:]), dtype=info.dtype)
        else:
            yield Copy(recipe.source) if same and not recipe.pad else recipe
    else:
        for part in recipe.parts:
            yield from _atoms(part, tensors)


def index_json(shards: Sequence[Shard]) -> dict[str, object]:
    """Content of `model.safetensors.index.json`."""
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    weight_map = {key: shard.name for shard in shards for key in shard.keys}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
