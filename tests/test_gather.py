"""Recipes and layout: every window of every recipe against plain indexing, shards against their promises."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.tensorfile import TensorInfo
from prismoe.convert.gather import Gatherer, draw, execute
from prismoe.convert.layout import lay_out
from prismoe.errors import InputError
from prismoe.recipe import Copy, Fill, Recipe, Stack, Take
from tests.handmade import handmade


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


def test_every_tensor_starts_on_its_natural_boundary(tmp_path: Path) -> None:
    tensors = {"a": TensorInfo("BF16", (3,), tmp_path, 0, 6), "b": TensorInfo("F32", (1,), tmp_path, 6, 4)}
    (shard,) = lay_out({"a": Copy("a"), "b": Copy("b")}, tensors, max_shard_bytes=100)
    assert shard.keys == ("b", "a")
    assert [piece.start % 4 for piece in shard.pieces] == [0, 0]


# Windows of every recipe kind at every cut, against the whole tensor made with plain indexing.

ROWS_, COLS_ = 7, 5
BOX = np.arange(ROWS_ * COLS_, dtype=np.float32).reshape(ROWS_, COLS_) - 11
INDEX = np.array([0, 3, 3, 6, 2], np.int32)
CASES: list[tuple[Recipe, np.ndarray]] = [
    (Copy("box"), BOX),
    (Take("box", 0, INDEX), BOX[INDEX]),
    (Take("box", 0, INDEX, 0.5, 2), np.vstack([BOX[INDEX] * np.float32(0.5), np.zeros((2, COLS_), np.float32)])),
    (Take("box", 0, np.arange(7, dtype=np.int32), 1.0, 1), np.vstack([BOX, np.zeros((1, COLS_), np.float32)])),
    (Take("box", 1, INDEX % 5), BOX[:, INDEX % 5]),
    (Take("box", 1, INDEX[:2], 3.0, 3), np.hstack([BOX[:, INDEX[:2]] * 3, np.zeros((ROWS_, 3), np.float32)])),
    (Fill((2, 3), "F32"), np.zeros((2, 3), np.float32)),
    (Fill((2, 3), "F32", rows=BOX[:2, :3].copy()), BOX[:2, :3]),
    (
        Stack((2, 7, 5), (Copy("box"), Take("box", 0, np.array([1, 1, 0, 2, 5], np.int32), 1.0, 2))),
        np.stack([BOX, np.vstack([BOX[[1, 1, 0, 2, 5]], np.zeros((2, COLS_), np.float32)])]),
    ),
]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(handmade(tmp_path_factory.mktemp("box"), tensors={"box": BOX}))


@pytest.mark.parametrize(("recipe", "expected"), CASES)
def test_execute_makes_the_whole_tensor(box: Checkpoint, recipe: Recipe, expected: np.ndarray) -> None:
    assert same_bits(execute(box, recipe), np.ascontiguousarray(expected))


@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 70), max_size=6))
@settings(deadline=None, max_examples=200)
def test_any_window_of_any_recipe(box: Checkpoint, case: tuple[Recipe, np.ndarray], cuts: list[int]) -> None:
    recipe, expected = case
    (shard,) = lay_out({"x": recipe}, box.tensors, max_shard_bytes=1 << 20)
    made = bytearray()
    with Gatherer.reading(box) as gatherer:
        for piece in shard.pieces:
            edges = sorted({0, piece.nbytes, *(4 * cut for cut in cuts if 4 * cut < piece.nbytes)})
            for low, high in itertools.pairwise(edges):
                part = bytearray(high - low)
                gatherer.fill(piece, low, high, memoryview(part))
                made += part
    assert bytes(made) == np.ascontiguousarray(expected).tobytes()


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=30), most=st.integers(1, 120))
def test_shards_hold_everything_once_and_stay_small(sizes: list[int], most: int) -> None:
    recipes: dict[str, Recipe] = {str(key): Fill((size,), "U8") for key, size in enumerate(sizes)}
    shards = lay_out(recipes, {}, max_shard_bytes=most)
    assert [key for shard in shards for key in shard.keys] == list(recipes)
    for shard in shards:
        size = shard.nbytes - len(shard.header)
        assert size == sum(sizes[int(key)] for key in shard.keys)
        assert size <= most or len(shard.keys) == 1


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (Copy("ghost"), "x: source tensor ghost is missing (hint: the checkpoint is not complete)"),
        (Take("box", 0, np.array([7], np.int32)), "x from box: index 7..7 of shape (1,); needed a list within 0..6"),
        (Take("box", 1, np.array([-1], np.int32)), "x from box: index -1..-1 of shape (1,); needed a list within 0..4"),
        (Take("box", 2, INDEX), "x from box: axis 2 of a tensor of shape (7, 5)"),
        (Take("box", 0, INDEX, float("nan")), "x from box: factor nan, pad 0; needed finite, and pad ≥ 0"),
        (Fill((2, 2), "F32", rows=BOX), "x: (7, 5) numbers; needed (2, 2)"),
        (Stack((9,), (Copy("box"),)), "x: stack of [('F32', (7, 5))]; needed one dtype and together (9,)"),
    ],
)
def test_recipes_are_checked_on_shapes(box: Checkpoint, recipe: Recipe, line: str) -> None:
    with pytest.raises(InputError) as caught:
        lay_out({"x": recipe}, box.tensors, max_shard_bytes=100)
    assert str(caught.value) == line


def test_draws_that_overflow_their_dtype_are_refused() -> None:
    with pytest.raises(InputError, match="numbers that are not finite"):
        draw(Fill((4,), "F16", std=1e9, key=(1, 2)))
