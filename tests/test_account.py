"""The accountant against published and independently computed counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from prismoe.account import account
from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import DenseConfig, dense_config
from prismoe.lowering import lower
from prismoe.plan import PlanShape, make_plan, plan_shape
from prismoe.targets import find_target
from tests.tiny import tiny_dense

LLAMA2_7B = dense_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
)
LLAMA3_8B = replace(LLAMA2_7B, intermediate_size=14336, num_kv_heads=8, vocab_size=128256, max_positions=8192)


def shape(dense: DenseConfig, experts: int, top_k: int, width: int, shared: int = 0, scale: float = 4.0) -> PlanShape:
    layers = dense.num_layers
    return PlanShape(layers, tuple(range(layers)), experts, top_k, width, shared, (scale,))


@pytest.mark.parametrize(
    ("experts", "top_k", "published"),
    [(16, 2, 2_953_064_448), (16, 4, 3_494_129_664), (8, 2, 3_493_074_944)],
)
def test_llama_moe_active_parameters(experts: int, top_k: int, published: int) -> None:
    """LLaMA-MoE's published counts hold a two-layer router: E·D + E·E a layer. A stock class has the linear E·D."""
    found = account(LLAMA2_7B, shape(LLAMA2_7B, experts, top_k, 11008 // experts))
    assert found.dense_parameters == 6_738_415_616
    assert found.active_parameters == published - 32 * experts * experts
    assert found.ffn_active_percent == pytest.approx(100 * top_k / experts)
    assert found.ffn_active_percent_of_dense == pytest.approx(100 * top_k / experts)


def test_llama3_partition_and_upcycling() -> None:
    partition = account(LLAMA3_8B, shape(LLAMA3_8B, 8, 2, 14336 // 8))
    assert partition.active_parameters == 3_803_451_392
    assert partition.total_parameters == 8_031_309_824
    upcycled = account(LLAMA3_8B, shape(LLAMA3_8B, 8, 2, 14336, scale=1.0))
    assert round(upcycled.total_parameters / 1e9, 1) == 47.5
    assert round(upcycled.active_parameters / 1e9, 1) == 13.7
    assert upcycled.ffn_active_percent == pytest.approx(25)
    assert upcycled.ffn_active_percent_of_dense == pytest.approx(200)


def test_padding_is_counted_apart() -> None:
    found = account(LLAMA2_7B, shape(LLAMA2_7B, 16, 4, 688))
    assert found.padding_parameters == 32 * 16 * 3 * 4096 * (704 - 688)
    assert found.disk_bytes == 2 * (found.total_parameters + found.padding_parameters)
    assert "688" in found.notes[0]
    assert "704" in found.notes[0]
    assert account(LLAMA2_7B, shape(LLAMA2_7B, 16, 4, 688), pad_to=8).padding_parameters == 0


def test_flops_are_two_per_multiplied_weight() -> None:
    found = account(LLAMA2_7B, shape(LLAMA2_7B, 8, 2, 1376))
    norms, table = 32 * 2 * 4096 + 4096, 32000 * 4096
    assert found.dense_flops_per_token == 2 * (6_738_415_616 - norms - table)
    assert found.flops_per_token == 2 * (found.active_parameters - norms - table)
    tied = account(replace(LLAMA2_7B, tie_embeddings=True), shape(LLAMA2_7B, 8, 2, 1376))
    assert tied.flops_per_token == found.flops_per_token
    assert tied.total_parameters == found.total_parameters - table


def test_scale_note_only_where_folding_rounds() -> None:
    assert not account(LLAMA2_7B, shape(LLAMA2_7B, 8, 2, 1376, scale=4.0)).notes
    assert "2.66667" in account(LLAMA2_7B, shape(LLAMA2_7B, 8, 2, 1376, scale=8 / 3)).notes[0]
    single = replace(LLAMA2_7B, dtype="float32")
    assert not account(single, shape(single, 8, 2, 1376, scale=8 / 3)).notes


def test_verdicts_name_the_field() -> None:
    found = account(LLAMA2_7B, shape(LLAMA2_7B, 8, 2, 1024, shared=2816), target="granitemoeshared")
    assert found.accepted_by == ("glm4_moe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "qwen2_moe")
    assert [objection.field for objection in found.objections["mixtral"]] == ["shared_width"]
    assert [objection.field for objection in found.objections["qwen3_moe"]] == ["qk_norm", "shared_width"]
    assert found.to_dict()["objections"]["mixtral"][0] == {
        "field": "shared_width",
        "found": "2816",
        "needed": "0: it has no shared expert",
    }


@pytest.mark.parametrize(
    ("family", "target", "method", "arguments"),
    [
        ("llama", "mixtral", "random", {"num_experts": 6}),
        ("llama", "mixtral", "upcycle", {"num_experts": 3}),
        ("qwen2", "granitemoeshared", "random", {"num_experts": 8, "shared": 16}),
        ("qwen3", "qwen3_moe", "random", {"num_experts": 8, "layers": "1-2"}),
        ("llama", "qwen2_moe", "upcycle", {"num_experts": 3}),
        ("qwen3", "glm4_moe", "random", {"num_experts": 4, "shared": 40}),
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "random", {"num_experts": 4, "shared": 40}),
        ("phi3", "granitemoe_swa", "random", {"num_experts": 8}),
    ],
)
def test_counts_equal_the_lowered_tensors(
    tmp_path: Path, family: str, target: str, method: str, arguments: dict[str, object]
) -> None:
    """Total and bytes against the sum over every recipe's output shape."""
    checkpoint = Checkpoint.open(tiny_dense(tmp_path, family, tie_word_embeddings=family == "qwen2"))
    plan = make_plan(checkpoint, method=method, **arguments)  # type: ignore[arg-type]
    found = account(checkpoint.family, plan_shape(plan), target=target)
    recipes = lower(checkpoint, plan, find_target(target))
    numbers = sum(_numbers(recipe, checkpoint) for recipe in recipes.values())
    assert found.total_parameters + found.padding_parameters == numbers
    assert found.disk_bytes == 4 * numbers


def _numbers(recipe: object, checkpoint: Checkpoint) -> int:
    from prismoe.recipe import Copy, Fill, Stack, Take

    match recipe:
        case Copy(source=source):
            return math.prod(checkpoint.tensors[source].shape)
        case Take(source=source, axis=axis, index=index, pad=pad):
            return checkpoint.tensors[source].shape[1 - axis] * (len(index) + pad)
        case Fill(shape=dims):
            return math.prod(dims)
        case Stack(shape=dims, parts=parts):
            assert math.prod(dims) == sum(_numbers(part, checkpoint) for part in parts)
            return math.prod(dims)
    raise AssertionError(recipe)
