"""config.json of the dense model that a mixture's layers are those of: one row for each architecture that we write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import DenseConfig, dense_config
from prismoe.errors import InputError

__all__ = ["DENSE", "dense_counterpart"]

NEUTRAL = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
# Keys that speak of experts, or of Granite's factors where they change nothing.
DROPPED = {
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_intermediate_size"),
    *("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "position_embedding_type"),
}
# Where mixture and dense class differ in what they take an absent key for, it has to be there.
NEEDED = ("rms_norm_eps", "num_key_value_heads", "vocab_size", "tie_word_embeddings")


@dataclass(frozen=True)
class Counterpart:
    """`family(config, has_o_bias)` names the dense family and the keys that it needs to say the same."""

    family: Callable[[Mapping[str, Any], bool], tuple[str, dict[str, Any]]]
    needed: tuple[str, ...] = ()


def _mixtral(config: Mapping[str, Any], has_o_bias: bool) -> tuple[str, dict[str, Any]]:
    if config.get("sliding_window") is None:
        return "llama", {"attention_bias": False}
    return "mistral", {}


def _granite(config: Mapping[str, Any], has_o_bias: bool) -> tuple[str, dict[str, Any]]:
    plain = all(config.get(key, value) == value for key, value in NEUTRAL.items())
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    found = config.get("attention_multiplier")
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 and isinstance(found, int | float):
        plain = plain and found == (hidden // heads) ** -0.5
    if not plain or found is None:
        return "granite", {}
    drop = dict.fromkeys((*NEUTRAL, "attention_multiplier"))
    if config.get("attention_bias") and not has_o_bias:
        return "qwen2", {**drop, "use_sliding_window": False}
    return "llama", drop


def _qwen3(config: Mapping[str, Any], has_o_bias: bool) -> tuple[str, dict[str, Any]]:
    return "qwen3", {}


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
}

DENSE: dict[str, Counterpart] = {
    "mixtral": Counterpart(_mixtral),
    "granitemoeshared": Counterpart(_granite),
    "qwen3_moe": Counterpart(_qwen3, ("head_dim",)),
}
"""Every mixture that `densify` reads, by model_type."""


def dense_counterpart(
    checkpoint: Checkpoint, *, neurons: int, moe_layers: frozenset[int]
) -> tuple[DenseConfig, dict[str, Any]]:
    """The dense model with at least `neurons` neurons a layer: as `DenseConfig`, and its whole config.json.

    Layers of the mixture that are dense fix the width; narrower experts then end in zero neurons.

    Raises:
        InputError: a key that decides the arithmetic is missing, or dense layers are narrower than the experts.
    """
    where = str(checkpoint.folder / "config.json")
    config = checkpoint.config
    row = DENSE[config["model_type"]]
    for key in (*NEEDED, *row.needed):
        if config.get(key) is None:
            raise InputError("missing", where=f"{where}: {key}", needed="a value; the dense class has another default")
    if config.get("rope_theta") is None and "rope_theta" not in (config.get("rope_parameters") or {}):
        raise InputError("missing", where=f"{where}: rope_theta", needed="a number")
    own = {
        info.shape[0]
        for name, info in checkpoint.tensors.items()
        if name.endswith(".mlp.gate_proj.weight") and int(name.split(".")[2]) not in moe_layers
    }
    if len(own) > 1 or (own and max(own) < neurons):
        found = f"dense layers of {sorted(own)} neurons beside experts of {neurons} together"
        raise InputError(found, where=str(checkpoint.folder), needed="one width for all layers")
    family, changes = row.family(config, _has_o_bias(checkpoint))
    kept = {key: value for key, value in config.items() if key not in DROPPED}
    kept |= {
        **changes,
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "intermediate_size": max({neurons, *own}),
    }
    kept = {key: value for key, value in kept.items() if key not in changes or value is not None}
    dense = dense_config(kept, where=where)
    scaling = dense.rope_scaling or {"rope_type": "default"}
    kept |= {
        "head_dim": dense.head_dim,
        "rope_theta": dense.rope_theta,
        "rope_scaling": dense.rope_scaling,
        "rope_parameters": {**scaling, "rope_theta": dense.rope_theta},
    }
    return dense, kept


def _has_o_bias(checkpoint: Checkpoint) -> bool:
    """Whether any output projection has a bias that is not zero (a target adds zeros where all four have one)."""
    names = (name for name in checkpoint.tensors if name.endswith(".self_attn.o_proj.bias"))
    return any(bool(checkpoint.array(name).any()) for name in names)
