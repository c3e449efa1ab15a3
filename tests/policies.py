"""What tests of router policies share: tiny stock models of every target's class, and references in float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prismoe.train.routers import Moment

HIDDEN, EXPERTS = 16, 6
# How each class weighs: score, whether the kept scores are divided by their sum, and a factor.
RULES = {
    "mixtral": ("softmax", True, 1.0),
    "qwen2_moe": ("softmax", False, 1.0),
    "qwen3_moe": ("softmax", True, 1.0),
    "granitemoe": ("softmax", True, 1.0),
    "granitemoeshared": ("softmax", True, 1.0),
    "flex_olmo": ("softmax", False, 1.0),
    "ernie4_5_moe": ("softmax", True, 1.0),
    "hunyuan_v1_moe": ("softmax", True, 1.0),
    "glm4_moe": ("sigmoid", True, 2.5),
    "cohere2_moe": ("sigmoid", True, 1.0),
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "norm_topk_prob": False},
    "qwen3_moe": {"moe_intermediate_size": 8, "norm_topk_prob": True, "head_dim": 8},
    "granitemoeshared": {"shared_intermediate_size": 8},
    "flex_olmo": {"norm_topk_prob": False},
    "ernie4_5_moe": {"moe_intermediate_size": 8, "moe_layer_start_index": 0, "moe_k": 2, "head_dim": 8},
    "hunyuan_v1_moe": {"moe_topk": 2, "head_dim": 8},
    "glm4_moe": {
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    },
    "cohere2_moe": {"expert_selection_fn": "sigmoid", "norm_topk_prob": True, "num_shared_experts": 0, "head_dim": 8},
}


def stock(model_type: str = "mixtral", *, num_experts: int = EXPERTS, top_k: int = 2, seed: int = 0) -> Any:
    """A stock model in training mode: two layers with uneven routers, hidden 16, vocabulary 32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "num_experts_per_tok": top_k,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    names = {"mixtral": ["num_local_experts"], "glm4_moe": ["n_routed_experts", "num_local_experts"]}
    if model_type.startswith("granite"):
        names[model_type] = ["num_local_experts"]
    elif model_type == "ernie4_5_moe":
        names[model_type] = ["moe_num_experts"]
    settings |= dict.fromkeys(names.get(model_type, ["num_experts"]), num_experts)
    config = AutoConfig.for_model(model_type, **{**settings, **_OWN.get(model_type, {})})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def moment(tokens: int, *, step: int = 3, first: int = 0, seed: int = 7) -> Moment:
    """One sequence of so many tokens."""
    return Moment(seed=seed, step=step, token_numbers_T=torch.arange(first, first + tokens), seq_len=tokens)


def reference_scores(logits: np.ndarray, rule: tuple[str, bool, float]) -> np.ndarray:
    """Scores of all experts [T, E]."""
    if rule[0] == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def reference_weights(logits: np.ndarray, chosen: np.ndarray, rule: tuple[str, bool, float]) -> np.ndarray:
    """Weights of the chosen experts [T, K]."""
    kept = np.take_along_axis(reference_scores(logits, rule), chosen, axis=1)
    return rule[2] * (kept / kept.sum(axis=1, keepdims=True) if rule[1] else kept)


def top(values: np.ndarray, count: int) -> np.ndarray:
    """Columns of the greatest values, greatest first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]
