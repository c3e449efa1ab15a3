"""Dense configs: both spellings, every family, and each refusal by its exact line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import FAMILIES, check_tensors, dense_config, optional_tensor, tensor_shapes
from prismoe.errors import InputError
from tests.tiny import tiny_dense

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


def read(**changes: Any) -> Any:
    return dense_config({**LLAMA, **changes})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_config_promises_the_tensors_that_stock_transformers_saves(tmp_path: Path, family: str, tied: bool) -> None:
    biased = {"attention_bias": True} if FAMILIES[family].qkv_bias is None else {}
    head_dim = 16 if family in ("cohere2", "phi3") else 32  # Cohere and Phi-3 derive it
    checkpoint = Checkpoint.open(tiny_dense(tmp_path, family, tie_word_embeddings=tied, head_dim=head_dim, **biased))
    assert tensor_shapes(checkpoint.family) == {name: info.shape for name, info in checkpoint.tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_stock_config(tmp_path: Path, family: str) -> None:
    """Every field against what stock transformers understands of the same file, defaults included."""
    from transformers import AutoConfig

    changes = {"model_type": family, "bos_token_id": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    stock, mine = AutoConfig.from_pretrained(tmp_path), Checkpoint.open(tmp_path).family
    assert mine.head_dim == (getattr(stock, "head_dim", None) or 16)
    assert mine.num_kv_heads == stock.num_key_value_heads == 2
    assert mine.rope_theta == stock.rope_parameters["rope_theta"] == 7e5
    assert mine.rms_eps == (stock.layer_norm_eps if family == "cohere2" else stock.rms_norm_eps)
    assert mine.tie_embeddings == stock.tie_word_embeddings
    assert mine.initializer_range == stock.initializer_range
    assert (mine.bos_token_id, mine.eos_token_id) == (5, stock.eos_token_id)
    assert mine.sliding_window == stock.__dict__.get("sliding_window")


def test_old_and_new_rope_spelling_mean_the_same() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    old = read(rope_theta=5e5, rope_scaling=scaling)
    new = read(rope_parameters={"rope_theta": 5e5, **scaling})
    both = read(rope_theta=5e5, rope_scaling=scaling, rope_parameters={"rope_theta": 5e5, **scaling})
    assert old == new == both
    assert old.rope_scaling == scaling
    assert read(rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert read(rope_scaling=None, rope_theta=1e4).rope_scaling is None
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 1e4}).rope_scaling is None
    assert read().rope_theta == 1e4


def test_dtype_and_token_ids() -> None:
    assert read(torch_dtype="bfloat16").dtype == read(dtype="bfloat16").dtype == "bfloat16"
    assert read().dtype is None
    assert (read().bos_token_id, read().eos_token_id) == (1, 2)
    assert (read(bos_token_id=None).bos_token_id, read(eos_token_id=[2, 7]).eos_token_id) == (None, [2, 7])


@pytest.mark.parametrize(
    ("changes", "window", "layers"),
    [
        ({"model_type": "llama", "sliding_window": 8}, None, ()),
        ({"model_type": "mistral", "sliding_window": 8}, 8, (0, 1, 2)),
        ({"model_type": "mistral", "sliding_window": None}, None, ()),
        ({"model_type": "mistral"}, 4096, (0, 1, 2)),
        ({"model_type": "qwen2", "sliding_window": 8}, None, ()),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, None, ()),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, 8, (1, 2)),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            8,
            (0,),
        ),
    ],
)
def test_sliding_window_as_stock_applies_it(
    tmp_path: Path, changes: dict[str, Any], window: int | None, layers: tuple[int, ...]
) -> None:
    from transformers import AutoConfig

    found = read(**changes)
    assert (found.sliding_window, found.sliding_layers) == (window, layers)
    assert found.slides_uniformly == (len(layers) in (0, 3))
    if changes["model_type"].startswith("qwen"):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        kinds = AutoConfig.from_pretrained(tmp_path).layer_types
        assert layers == tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model_type": "gemma2"},
            "config.json: model_type: unsupported family 'gemma2'; needed one of "
            "cohere2, ernie4_5, granite, hunyuan_v1_dense, llama, mistral, olmo2, phi3, qwen2, qwen3 "
            "(hint: norms around both halves of a layer and a GELU gate: no stock MoE class holds both, and softcapped "
            "logits)",
        ),
        (
            {"model_type": None},
            "config.json: model_type: unsupported family None; needed one of "
            "cohere2, ernie4_5, granite, hunyuan_v1_dense, llama, mistral, olmo2, phi3, qwen2, qwen3",
        ),
        (
            {"hidden_act": "gelu"},
            "config.json: hidden_act: 'gelu'; needed 'silu' "
            "(hint: only SwiGLU feed-forward blocks can be cut into experts)",
        ),
        (
            {"mlp_bias": True},
            "config.json: mlp_bias: True; needed False (hint: biased feed-forward projections have no stock MoE class)",
        ),
        (
            {"pretraining_tp": 2},
            "config.json: pretraining_tp: 2; needed 1 (hint: set it to 1 if the weights are not sliced)",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "config.json: partial_rotary_factor: 0.5; needed 1.0 "
            "(hint: partial rotary embedding has no stock MoE class here)",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "config.json: rope_parameters: partial_rotary_factor 0.25; needed 1.0",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "config.json: rope_parameters: one rope per layer type; needed one for all layers",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "config.json: rope_scaling: unsupported rope type 'longrope'; "
            "needed one of default, linear, dynamic, yarn, llama3",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "config.json: rope_theta: old and new spelling disagree: [10000.0, 500000.0]; needed one value",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "config.json: rope_scaling: old and new spelling disagree: {'rope_type': 'linear', 'factor': 2.0} "
            "and None; needed one rope scaling",
        ),
        ({"hidden_size": None}, "config.json: hidden_size: missing; needed a positive whole number"),
        ({"hidden_size": "64"}, "config.json: hidden_size: '64'; needed a positive whole number"),
        ({"hidden_size": True}, "config.json: hidden_size: True; needed a positive whole number"),
        ({"intermediate_size": -1}, "config.json: intermediate_size: -1; needed a positive whole number"),
        (
            {"num_hidden_layers": 10_001},
            "config.json: num_hidden_layers: 10001; needed a positive whole number, at most 10000",
        ),
        ({"rms_norm_eps": -1e-6}, "config.json: rms_norm_eps: -1e-06; needed a finite number, not negative"),
        ({"tie_word_embeddings": "no"}, "config.json: tie_word_embeddings: 'no'; needed true or false"),
        (
            {"num_key_value_heads": 3},
            "config.json: num_key_value_heads: 3 does not divide 4 attention heads; needed a divisor",
        ),
        (
            {"num_attention_heads": 6},
            "config.json: num_attention_heads: 6 does not divide hidden_size 64; needed a divisor",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "config.json: layer_types: ['full_attention']; needed 3 of full_attention or sliding_attention",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
            "config.json: layer_types: layers that do not slide; needed sliding_attention everywhere",
        ),
        ({"eos_token_id": ["2"]}, "config.json: eos_token_id: ['2']; needed token ids"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**changes)
    assert str(caught.value) == line
    assert caught.value.exit_code == 3


def test_tensors_that_do_not_match_the_config() -> None:
    dense = read()
    shapes = tensor_shapes(dense)
    check_tensors(dense, shapes, where="folder")
    check_tensors(dense, {**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}, where="folder")
    cases = [
        (
            {k: v for k, v in shapes.items() if k != "model.norm.weight"},
            "folder: missing tensor model.norm.weight; needed what config.json describes",
        ),
        (
            {k: v for k, v in shapes.items() if ".mlp." not in k},
            "folder: missing tensor model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, "
            "model.layers.0.mlp.up_proj.weight and 6 more; needed what config.json describes",
        ),
        (
            {**shapes, "model.layers.0.self_attn.q_proj.bias": (64,)},
            "folder: unexpected tensor model.layers.0.self_attn.q_proj.bias; needed what config.json describes",
        ),
        ({**shapes, "model.norm.weight": (63,)}, "folder: model.norm.weight: shape [63]; needed [64]"),
    ]
    for found, line in cases:
        with pytest.raises(InputError) as caught:
            check_tensors(dense, found, where="folder")
        assert str(caught.value) == line


def test_a_stored_copy_of_a_tied_head_is_optional() -> None:
    assert optional_tensor(read(tie_word_embeddings=True), "lm_head.weight")
    assert not optional_tensor(read(), "lm_head.weight")
    assert "lm_head.weight" not in tensor_shapes(read(tie_word_embeddings=True))


def test_real_checkpoints(shared: Path) -> None:
    for name, neurons in (("stories260K", 172), ("babyllama105", 352), ("parent-4m", 768)):
        checkpoint = Checkpoint.open(shared / "models" / name)
        dense = checkpoint.family
        check_tensors(dense, {key: info.shape for key, info in checkpoint.tensors.items()}, where=name)
        assert dense.intermediate_size == neurons
        assert dense.tie_embeddings
