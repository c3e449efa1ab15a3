"""Dense checkpoint folders written byte by byte, without torch: quick to make and easy to damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, NEURONS, LAYERS, VOCAB = 16, 48, 2, 32
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIDE = {"tokenizer.json": b'{"a":  1}\n', "chat_template.jinja": b"{{ x }}\r\n", "generation_config.json": b"{}"}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights in bfloat16, norms in float32: two dtypes in one file."""
    draw = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(ml_dtypes.bfloat16)

    found = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "lm_head.weight": matrix(VOCAB, HIDDEN)}
    found["model.norm.weight"] = draw.standard_normal(HIDDEN).astype(np.float32)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = draw.standard_normal(HIDDEN).astype(np.float32)
        for name in "qkvo":
            found[f"{at}.self_attn.{name}_proj.weight"] = matrix(HIDDEN, HIDDEN)
        found[f"{at}.mlp.gate_proj.weight"] = matrix(NEURONS, HIDDEN)
        found[f"{at}.mlp.up_proj.weight"] = matrix(NEURONS, HIDDEN)
        found[f"{at}.mlp.down_proj.weight"] = matrix(HIDDEN, NEURONS)
    return found


def handmade(folder: Path, *, tensors: dict[str, np.ndarray] | None = None, shards: int = 1, **config: Any) -> Path:
    """Write a folder with `shards` shards, config and side files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    for name, data in SIDE.items():
        (folder / name).write_bytes(data)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    keys = sorted(tensors)
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in keys[number::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
