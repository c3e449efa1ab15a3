"""A stranger's config.json asks the stock library for no code and for no more memory than its files justify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.stockconfig import MAX_DEPTH, check_sizes, refuse_code
from prismoe.errors import InputError


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"text_config": {"auto_map": {"AutoModel": "code.Model"}}}, "text_config.auto_map: asks to run code"),
        ({"_attn_implementation": "stranger/kernel"}, "_attn_implementation: 'stranger/kernel'; needed eager or sdpa"),
        ({"attn_implementation": "stranger/kernel:main"}, "attn_implementation: "),
        ({"_attn_implementation_internal": "flash_attention_2"}, "_attn_implementation_internal: "),
        ({"_experts_implementation": "stranger/kernel"}, "_experts_implementation: "),
        ({"use_kernels": True, "kernel_config": {"RMSNorm": "stranger/norm"}}, "kernel_config: "),
        ({"_attn_implementation": {"": "sdpa", "vision": "stranger/kernel"}}, "_attn_implementation: "),
        ({"a": {"b": {"ATTN_IMPLEMENTATION": ["sdpa", "stranger/kernel"]}}}, "a.b.ATTN_IMPLEMENTATION: "),
    ],
)
def test_code_from_elsewhere_is_refused_wherever_it_stands(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as raised:
        refuse_code(config, where="config.json")
    assert str(raised.value).startswith(f"config.json: {field}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "config",
    [
        {"_attn_implementation": "eager"},
        {"_attn_implementation": {"": "sdpa"}, "use_kernels": False},
        {"attn_implementation": None, "conv_kernel": False},
        {"text_config": {"auto_map": {}}},
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 64},
    ],
)
def test_what_stock_writes_is_not_refused(config: dict[str, Any]) -> None:
    refuse_code(config, where="config.json")


def test_a_config_that_is_nested_without_end_is_refused() -> None:
    def nested(depth: int) -> dict[str, Any]:
        return {"a": nested(depth - 1)} if depth else {}

    refuse_code(nested(MAX_DEPTH), where="config.json")
    with pytest.raises(InputError, match=f"nested deeper than {MAX_DEPTH} levels"):
        refuse_code(nested(MAX_DEPTH + 2), where="config.json")


CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 128}


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("num_hidden_layers", 1 << 40, True),
        ("num_local_experts", 129, True),
        ("num_local_experts", 128, False),  # the longest side of a tensor here, its vocabulary's
        ("n_routed_experts", -2, True),
        ("num_experts", -1, False),  # as some stock configs say "none"
        ("hidden_size", 1e30, True),
        ("moe_intermediate_size", 1 << 33, True),
        ("head_dim", 1 << 20, True),
        ("max_position_embeddings", 1 << 20, False),  # no weight has that side
    ],
)
def test_no_size_is_beyond_what_the_files_could_hold(tmp_path: Path, key: str, value: float, refused: bool) -> None:
    save_file({"model.embed_tokens.weight": np.zeros((128, 64), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    checkpoint = Checkpoint.open(tmp_path)
    if not refused:
        check_sizes(checkpoint)
        return
    with pytest.raises(InputError, match=rf"config\.json: {key}: .*; needed at most 128, as in the files"):
        check_sizes(checkpoint)


def test_a_folder_without_weights_builds_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match=r"no weights; needed model\.safetensors"):
        check_sizes(Checkpoint.open(tmp_path))
