"""The released LLaMA-MoE layout rebuilt from its documentation: small checkpoints, and their forward in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn.functional import silu

from tests.tiny import tiny_tokenizer

D, LAYERS, E, K, VOCAB = 64, 2, 4, 2, 128
RELEASED: dict[str, Any] = {
    "architectures": ["LlamaMoEForCausalLM"],
    "model_type": "llama_moe",
    "auto_map": {"AutoModelForCausalLM": "modeling_llama_moe_hf.LlamaMoEForCausalLM"},
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_use_balance": True,
    "gate_balance_loss_weight": 0.01,
    "gate_add_noise": True,
    "gate_noise_epsilon": 0.01,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "add_weight_norm": False,
    "drop_tokens": True,
    "dropped_padding": "zero",
    "capacity_factor": 1.25,
    "gates": "mlp",
    "torch_dtype": "float32",
}
SMALL = {
    **RELEASED,
    **{"vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 96, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": E, "num_selects": K},
    **{"size_experts": [[24] * E] * LAYERS, "score_scale_factor": 2.0},
}
Weights = dict[str, np.ndarray]


def weights(config: dict[str, Any], *, curve: float = 0.02, seed: int = 0) -> Weights:
    """Every tensor of the layout by its documented name; `curve` 0.02 keeps the tanh all but straight, 1 bends it."""
    draw = np.random.default_rng(seed)

    def matrix(*shape: int, std: float = 0.12) -> np.ndarray:
        return (std * draw.standard_normal(shape)).astype(np.float32)

    kv = config["num_key_value_heads"] * D // config["num_attention_heads"]
    found = {"model.embed_tokens.weight": matrix(VOCAB, D), "lm_head.weight": matrix(VOCAB, D)}
    found["model.norm.weight"] = 1 + matrix(D)
    for layer, widths in enumerate(config["size_experts"]):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = 1 + matrix(D)
        for name, rows in (("q", D), ("k", kv), ("v", kv), ("o", D)):
            found[f"{at}.self_attn.{name}_proj.weight"] = matrix(rows, D)
        found[f"{at}.self_attn.rotary_emb.inv_freq"] = (1e4 ** -(np.arange(8) / 8)).astype(np.float32)
        if config["gate_network"] == "linear":
            found[f"{at}.mlp.gate.gate_network.weight"] = matrix(E, D, std=0.3)
        else:
            found[f"{at}.mlp.gate.gate_network.0.weight"] = matrix(E, D, std=0.12 * curve)
            found[f"{at}.mlp.gate.gate_network.2.weight"] = matrix(E, E, std=2 / curve)
        found[f"{at}.mlp.gate.weight_noise.weight"] = np.zeros((E, D), np.float32)
        for expert, width in enumerate(widths):
            found[f"{at}.mlp.calculator.experts.weight_gate.{expert}"] = matrix(width, D)
            found[f"{at}.mlp.calculator.experts.weight_up.{expert}"] = matrix(width, D)
            found[f"{at}.mlp.calculator.experts.weight_down.{expert}"] = matrix(D, width)
    return found


def released(folder: Path, *, tensors: Weights | None = None, curve: float = 0.02, **changes: Any) -> Path:
    tiny_tokenizer(folder)
    config = {**SMALL, **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    save_file(weights(config, curve=curve) if tensors is None else tensors, folder / "model.safetensors")
    return folder


class Reference:
    """The original's forward pass written out in float64: no class of transformers, none of prismoe."""

    def __init__(self, config: dict[str, Any], found: Weights) -> None:
        self.config = config
        self.w = {name: torch.from_numpy(np.asarray(array, np.float64)) for name, array in found.items()}
        self.inputs: list[torch.Tensor] = []
        self.routers: dict[int, torch.Tensor] = {}  # linear rows in place of the network

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.w[f"{name}.weight"]

    def attention(self, x: torch.Tensor, at: str) -> torch.Tensor:
        count, heads, kv = len(x), self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = D // heads
        angles = torch.outer(torch.arange(count), 1e4 ** -(torch.arange(size // 2) * 2 / size)).double()
        cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))

        def rotate(z: torch.Tensor) -> torch.Tensor:
            half = torch.cat([-z[..., size // 2 :], z[..., : size // 2]], -1)
            return z * cos + half * sin

        q, k, v = (
            (x @ self.w[f"{at}.self_attn.{name}_proj.weight"].T).view(count, -1, size).transpose(0, 1) for name in "qkv"
        )
        k, v = (z.repeat_interleave(heads // kv, 0) for z in (k, v))
        scores = rotate(q) @ rotate(k).transpose(1, 2) / math.sqrt(size)
        scores = scores + torch.full((count, count), -math.inf).triu(1)
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, D)
        return out @ self.w[f"{at}.self_attn.o_proj.weight"].T

    def router(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        if layer in self.routers:
            return x @ self.routers[layer].double().T
        at = f"model.layers.{layer}.mlp.gate.gate_network"
        if f"{at}.weight" in self.w:
            return x @ self.w[f"{at}.weight"].T
        return torch.tanh(x @ self.w[f"{at}.0.weight"].T) @ self.w[f"{at}.2.weight"].T

    def experts(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        kept, chosen = self.router(x, layer).topk(self.config["num_selects"])
        gates = torch.zeros(len(x), E, dtype=torch.float64).scatter(1, chosen, kept.softmax(-1))
        at, out = f"model.layers.{layer}.mlp.calculator.experts", torch.zeros_like(x)
        for e in range(E):
            h = silu(x @ self.w[f"{at}.weight_gate.{e}"].T) * (x @ self.w[f"{at}.weight_up.{e}"].T)
            out = out + gates[:, e, None] * (h @ self.w[f"{at}.weight_down.{e}"].T)
        scale = self.config["score_scale_factor"]
        return out * (scale[layer] if isinstance(scale, list) else scale)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.inputs = []
        x = self.w["model.embed_tokens.weight"][ids]
        for layer in range(LAYERS):
            at = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{at}.input_layernorm"), at)
            self.inputs.append(self.norm(x, f"{at}.post_attention_layernorm"))
            x = x + self.experts(self.inputs[-1], layer)
        return self.norm(x, "model.norm") @ self.w["lm_head.weight"].T


def documented(experts: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released 7B model, as its index lists them."""
    h, neurons = 4096, 11008 // experts
    found = {"model.embed_tokens.weight": (32000, h), "model.norm.weight": (h,), "lm_head.weight": (32000, h)}
    for layer in range(32):
        at = f"model.layers.{layer}"
        found |= {f"{at}.{name}.weight": (h,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{at}.self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
        found[f"{at}.self_attn.rotary_emb.inv_freq"] = (64,)
        found[f"{at}.mlp.gate.gate_network.0.weight"] = (experts, h)
        found[f"{at}.mlp.gate.gate_network.2.weight"] = (experts, experts)
        found[f"{at}.mlp.gate.weight_noise.weight"] = (experts, h)
        for e in range(experts):
            found |= {f"{at}.mlp.calculator.experts.weight_{part}.{e}": (neurons, h) for part in ("gate", "up")}
            found[f"{at}.mlp.calculator.experts.weight_down.{e}"] = (h, neurons)
    return found
