"""The dense families prismoe reads, one row each, and those it refuses by name. Data only: `family.py` reads it.

transformers' model classes are the reference for every default and every name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FAMILIES", "GRANITE", "REFUSED", "Family"]

GRANITE = dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0)
"""Granite's four factors, under the names that its mixtures use too, with what they are where config.json is silent."""


@dataclass(frozen=True)
class Family:
    """What a model_type fixes without a config key of its own.

    Attributes:
        block: how a decoder layer is put together; a target names the one it has. "pre-norm" is Llama's, "post-norm"
            OLMo2's (norms behind attention and FFN, query and key norms over all heads), "interleaved" Llama's with
            Ernie's rotary pairs, "parallel" Cohere's (one LayerNorm, attention beside FFN, rope only in sliding
            layers), "late qk norm" HunYuan's (query and key norms behind rope).
        qkv_bias, o_bias: None where the key `attention_bias` decides.
        head_dim: the default where config.json has none; None is hidden_size / num_heads.
        sliding: never | always | by layer (layer_types, or from max_window_layers on) | pattern (layer_types, or all
            but every `sliding_window_pattern`-th).
        window: tokens where config.json has no `sliding_window`; None is no window.
        bos_eos: token ids where config.json has no such key.
        norms: the norms of a layer, in its order, and `eps` the key of their epsilon.
        qk_norms: names of the norms on queries and keys, where there are any.
        fused: stored matrix: the projections whose rows it holds, in order.
        multipliers: factors by key, with their defaults.
        refused: key: the only value that we carry, beside those of every family.
    """

    block: str = "pre-norm"
    qkv_bias: bool | None = False
    o_bias: bool | None = False
    qk_norms: tuple[str, ...] = ()
    head_dim: int | None = None
    sliding: str = "never"
    window: int | None = 4096
    bos_eos: tuple[int | None, int | list[int] | None] = (None, None)
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6)
    rope_theta: float = 10_000.0
    tied: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    multipliers: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, bool] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "cohere2": Family(
        block="parallel",
        qkv_bias=None,
        o_bias=None,
        sliding="pattern",
        bos_eos=(5, 255001),
        eps=("layer_norm_eps", 1e-5),
        tied=True,
        norms=("input_layernorm",),
        multipliers={"logit_scale": 0.0625},
    ),
    "ernie4_5": Family(
        block="interleaved",
        head_dim=128,
        bos_eos=(1, 2),
        eps=("rms_norm_eps", 1e-5),
        rope_theta=500_000.0,
        tied=True,
        refused={"use_bias": False},
    ),
    "granite": Family(qkv_bias=None, o_bias=None, bos_eos=(1, 2), multipliers=GRANITE),
    "hunyuan_v1_dense": Family(
        block="late qk norm",
        qkv_bias=None,
        o_bias=None,
        qk_norms=("query_layernorm", "key_layernorm"),
        bos_eos=(1, 2),
        eps=("rms_norm_eps", 1e-5),
    ),
    "llama": Family(qkv_bias=None, o_bias=None, bos_eos=(1, 2)),
    "mistral": Family(sliding="always", bos_eos=(1, 2)),
    "olmo2": Family(
        block="post-norm",
        qkv_bias=None,
        o_bias=None,
        qk_norms=("q_norm", "k_norm"),
        bos_eos=(None, 50279),
        eps=("rms_norm_eps", 1e-5),
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "phi3": Family(
        sliding="always",
        window=None,
        bos_eos=(1, 32000),
        eps=("rms_norm_eps", 1e-5),
        fused={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
    ),
    "qwen2": Family(qkv_bias=True, sliding="by layer"),
    "qwen3": Family(qkv_bias=None, o_bias=None, qk_norms=("q_norm", "k_norm"), head_dim=128, sliding="by layer"),
}
"""Every dense family prismoe reads, by config.json's model_type."""

GEMMA = "norms around both halves of a layer and a GELU gate: no stock MoE class holds both"
REFUSED: dict[str, str] = {
    "cohere": "attention beside FFN with rope in every layer: the stock class of that block leaves it out in some",
    "exaone4": "its norms stand behind both halves, its query and key norms are per head and some layers have no rope",
    "gemma": "GELU-gated FFN: engines other than transformers compute SiLU for every class that could hold it",
    "gemma2": GEMMA + ", and softcapped logits",
    "gemma3": GEMMA,
    "gemma3_text": GEMMA,
    "glm4": "four norms a layer and partial rotary embedding: no stock MoE class has them",
    "olmo3": "norms behind both halves and a window in some layers only: FlexOlmo has no window",
    "smollm3": "some layers have no rotary embedding: no stock MoE class with its block does that",
}
"""Families refused by name, with the reason."""
