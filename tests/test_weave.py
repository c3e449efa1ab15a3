"""A weave against plain NumPy: both axes, fused and single sources, windows of any cut, and every way to refuse."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismoe.checkpoint import Checkpoint
from prismoe.convert.gather import Gatherer, execute
from prismoe.convert.layout import lay_out, recipe_tensor
from prismoe.errors import InputError
from prismoe.recipe import Strand, Weave
from tests.handmade import handmade

D, W, E = 16, 12, 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    draw = np.random.default_rng(1)
    tensors = {
        "rows": draw.standard_normal((W, D)).astype(ml_dtypes.bfloat16),
        "columns": draw.standard_normal((D, W)).astype(ml_dtypes.bfloat16),
        "fused rows": draw.standard_normal((E, 2 * W, D)).astype(ml_dtypes.bfloat16),
        "fused columns": draw.standard_normal((E, D, W)).astype(ml_dtypes.bfloat16),
        "damaged": np.full((W, D), np.nan, ml_dtypes.bfloat16),
        "wide": np.zeros((W, D), np.float32),
    }
    return Checkpoint.open(handmade(tmp_path_factory.mktemp("weave"), tensors=tensors)), tensors


def strands(axis: int) -> tuple[Strand, ...]:
    """A single tensor and expert 2 of a fused one (its second half of rows), cut to 7 places and scaled."""
    if axis:
        return Strand("columns", 0, W), Strand("fused columns", 2 * D, 7, 0.25)
    return Strand("rows", 0, W), Strand("fused rows", 2 * 2 * W + W, 7, 0.25)


def expected(tensors: dict[str, np.ndarray], axis: int, order: np.ndarray, pad: int) -> np.ndarray:
    if axis:
        beside = np.concatenate([tensors["columns"], tensors["fused columns"][2, :, :7] * ml_dtypes.bfloat16(0.25)], 1)
        return np.pad(beside[:, order], ((0, 0), (0, pad)))
    fused = tensors["fused rows"][2, W : W + 7] * ml_dtypes.bfloat16(0.25)
    return np.pad(np.concatenate([tensors["rows"], fused])[order], ((0, pad), (0, 0)))


@pytest.mark.parametrize("axis", [0, 1])
@given(seed=st.integers(0, 99), pad=st.integers(0, 5), cuts=st.lists(st.integers(0, 24 * D), max_size=4))
def test_any_window_is_what_numpy_makes(source, axis: int, seed: int, pad: int, cuts: list[int]) -> None:  # type: ignore[no-untyped-def]
    checkpoint, tensors = source
    order = np.random.default_rng(seed).permutation(W + 7).astype(np.int32)
    total = W + 7 + pad
    weave = Weave((D, total) if axis else (total, D), axis, strands(axis), order)
    wanted = expected(tensors, axis, order, pad)
    assert execute(checkpoint, weave).tobytes() == wanted.tobytes()
    ((piece,),) = [shard.pieces for shard in lay_out({"w": weave}, checkpoint.tensors, max_shard_bytes=1 << 40)]
    edges = sorted({0, total * D, *(cut for cut in cuts if cut < total * D)})
    made = bytearray(2 * total * D)
    with Gatherer.reading(checkpoint) as gatherer:
        for low, high in itertools.pairwise(edges):
            gatherer.fill(piece, 2 * low, 2 * high, memoryview(made)[2 * low : 2 * high])
    assert bytes(made) == wanted.tobytes()


def test_a_damaged_strand_is_named(source) -> None:  # type: ignore[no-untyped-def]
    weave = Weave((2 * W, D), 0, (Strand("rows", 0, W), Strand("damaged", 0, W)), np.arange(2 * W, dtype=np.int32))
    with pytest.raises(InputError, match="damaged: holds NaN or infinity"):
        execute(source[0], weave)


@pytest.mark.parametrize(
    ("weave", "found"),
    [
        (Weave((W, D), 0, (Strand("rows", 1, W),), np.arange(W, dtype=np.int32)), f"{W} rows from 1 on"),
        (Weave((D, W), 1, (Strand("columns", 0, W + 1),), np.arange(W + 1, dtype=np.int32)), f"{W + 1} columns"),
        (Weave((W, D), 0, (Strand("rows", 0, W),), np.zeros(W, np.int32)), "each of 12 places once"),
        (Weave((W, D), 0, (Strand("rows", 0, W, float("inf")),), np.arange(W, dtype=np.int32)), "factor inf"),
        (Weave((2, D), 0, (Strand("rows", 0, W),), np.arange(W, dtype=np.int32)), "12 places"),
        (
            Weave((2 * W, D), 0, (Strand("rows", 0, W), Strand("wide", 0, W)), np.arange(2 * W, dtype=np.int32)),
            "'BF16', 'F32'",
        ),
        (Weave((W, D), 0, (Strand("lost", 0, W),), np.arange(W, dtype=np.int32)), "lost is missing"),
    ],
)
def test_refused(source, weave: Weave, found: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=found):
        recipe_tensor(weave, source[0].tensors, key="made")
