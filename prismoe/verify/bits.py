"""Byte-for-byte checks: the folder against its manifest, its recipes and its source.

Recipes are carried out here a second time by a plain interpreter that shares no code with the executor but the random
stream, a part at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import optional_tensor
from prismoe.convert.gather import draw
from prismoe.folder import Manifest, sha256_file
from prismoe.layerplan.draws import row_normals
from prismoe.lowering import lower
from prismoe.plan import Plan
from prismoe.progress import Progress
from prismoe.recipe import Copy, Draws, Fill, Mean, Recipe, Stack, Weave
from prismoe.targets import find_target
from prismoe.verify.rest import rounded_mean

__all__ = ["changed_files", "differing_from_recipes", "not_carried"]

Array = npt.NDArray[Any]


def changed_files(folder: Path, manifest: Manifest, *, on_progress: Progress) -> list[str]:
    """Files of the manifest that are missing or whose size or sha256 is another."""
    changed = []
    for done, (name, entry) in enumerate(manifest.files.items()):
        on_progress("verify files", done, len(manifest.files))
        path = folder / name
        same = path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]
        if not same:
            changed.append(name)
    on_progress("verify files", len(manifest.files), len(manifest.files))
    return changed


def differing_from_recipes(
    moe: Checkpoint, dense: Checkpoint, plan: Plan, *, manifest: Manifest, on_progress: Progress
) -> list[str]:
    """Tensors that are missing, not asked for, or differ in dtype, shape or any bit from their recipe.

    Of a plan with branches `dense` is what `Plan.sources` gives.
    """
    config = manifest.config
    recipes = lower(
        dense, plan, find_target(config["target"]), pad_to=config["pad_to"], absorb=config.get("absorb", False)
    )
    wrong = sorted(set(moe.tensors) - set(recipes))
    for done, (key, recipe) in enumerate(recipes.items()):
        on_progress("verify tensors", done, len(recipes))
        if key not in moe.tensors or not _same(moe.array(key), recipe, dense):
            wrong.append(key)
    on_progress("verify tensors", len(recipes), len(recipes))
    return wrong


def not_carried(moe: Checkpoint, dense: Checkpoint, plan: Plan) -> list[str]:
    """Source tensors outside the feed-forward blocks that were cut which the folder does not hold bit for bit.

    Projections that the family stores fused are looked for apart, under the name of each. `dense` is what everything
    outside the experts comes from, see `outside`.
    """
    cut = tuple(f"model.layers.{layer}.mlp." for layer, found in enumerate(plan.layers) if found is not None)
    optional = {name: dense.array(name) for name in dense.tensors if optional_tensor(dense.family, name)}
    carried = {name: dense.rows(name) for name in dense.places if not name.startswith(cut)}
    return [
        name
        for name, array in {**carried, **optional}.items()
        if not (name not in moe.tensors and name in optional)
        and not (name in moe.tensors and _equal(moe.array(name), array))
    ]


def _equal(first: Array, second: Array) -> bool:
    """Same dtype, shape and bits (a NaN equals itself, -0 is not 0)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    bits = np.dtype(f"u{first.dtype.itemsize}")
    return np.array_equal(first.view(bits), second.view(bits))


def _same(found: Array, recipe: Recipe, dense: Checkpoint) -> bool:
    if isinstance(recipe, Copy):
        return _equal(found, dense.array(recipe.source))
    if not isinstance(recipe, Stack):
        return _equal(found, _make(recipe, dense))
    if found.shape != recipe.shape:
        return False
    return all(_equal(*pair) for pair in _parts(found.reshape(-1), recipe, dense))


def _parts(flat: Array, stack: Stack, dense: Checkpoint) -> Iterator[tuple[Array, Array]]:
    """(bytes on disk, bytes of the recipe) of each part of a stack; parts lie one after the other."""
    start = 0
    for part in stack.parts:
        made = _make(part, dense).reshape(-1)
        yield flat[start : start + made.size], made
        start += made.size


def _make(recipe: Recipe, dense: Checkpoint) -> Array:
    if isinstance(recipe, Copy):
        return dense.array(recipe.source)
    if isinstance(recipe, Fill):
        return draw(recipe)
    if isinstance(recipe, Mean):
        rows = slice(recipe.first, recipe.first + recipe.count)
        return rounded_mean([dense.array(name)[rows] for name in recipe.sources])
    assert not isinstance(recipe, Stack | Weave), "a stack holds no stack, and convert makes no weave"
    taken = np.take(dense.array(recipe.source), recipe.index, axis=recipe.axis)
    if recipe.draws is not None:
        taken = _drawn(taken, recipe.draws, axis=recipe.axis, factor=recipe.factor)
    elif recipe.factor != 1.0:
        taken = (taken.astype(np.float32) * np.float32(recipe.factor)).astype(taken.dtype)
    widths = [(0, recipe.pad if axis == recipe.axis else 0) for axis in range(taken.ndim)]
    return np.pad(taken, widths) if recipe.pad else taken


def _drawn(taken: Array, draws: Draws, *, axis: int, factor: float) -> Array:
    """The whole tensor at once: drawn places, noise elsewhere, the factor, one rounding."""
    exact: Any = np.float64 if taken.dtype == np.float64 else np.float32
    rows, columns = taken.shape
    normals = np.stack([row_normals(draws.key, stream=draws.stream, row=row, count=columns) for row in range(rows)])
    anew = np.zeros(taken.shape, dtype=bool)
    np.moveaxis(anew, axis, 0)[draws.slots] = True
    fresh = exact(draws.mean) + normals.astype(exact) * exact(draws.std)
    kept = taken.astype(exact) + normals.astype(exact) * exact(draws.noise)
    made: Array = (np.where(anew, fresh, kept) * exact(factor)).astype(taken.dtype)
    return made
