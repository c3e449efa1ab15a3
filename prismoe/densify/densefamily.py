"""config.json of the dense model that a mixture's layers are those of: one row for each architecture that we write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import DenseConfig, dense_config
from prismoe.errors import InputError

__all__ = ["DENSE", "dense_counterpart"]

NEUTRAL = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
DROPPED = {
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_intermediate_size"),
    *("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "position_embedding_type", "shared_expert_intermediate_size", "qkv_bias"),
    *(
        "n_routed_experts",
        "n_shared_experts",
        "first_k_dense_replace",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
    ),
    *("scoring_func", "topk_method", "use_qk_norm", "num_mtp_layers", "num_nextn_predict_layers"),
    *("moe_k", "moe_num_experts", "moe_num_shared_experts", "moe_layer_start_index", "moe_layer_end_index"),
    *("moe_layer_interval", "moe_norm_min", "moe_topk", "num_shared_expert", "num_shared_experts"),
    *("prefix_dense_intermediate_size", "shared_expert_combination_strategy", "expert_selection_fn"),
    *("mlp_layer_types", "prefix_dense_sliding_window_pattern", "layer_rope_theta", "time_step_limit"),
    *("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand"),
    *("mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias"),
}
"""Keys that speak of experts, of Mamba layers that are not there, or of Granite's factors where they change nothing."""
NEEDED = ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
"""Where mixture and dense class differ in what they take an absent key for, it has to be there."""

Config = Mapping[str, Any]
Changes = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Counterpart:
    """`family(config, biased)` names the dense family and the keys that it needs to say the same, None for those that
    it must not have; `biased` are the attention projections (q, k, v, o) with a bias that is not zero.

    `needed` keys must be there, `fixed` ones with the value that every mixture of ours has: with another one the
    experts add up to something else.
    """

    family: Callable[[Config, frozenset[str]], Changes]
    needed: tuple[str, ...] = ("rms_norm_eps",)
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _same(name: str, **changes: Any) -> Callable[[Config, frozenset[str]], Changes]:
    """The family that differs from its mixture in nothing but the experts."""
    return lambda config, biased: (name, changes)


def _llama_like(config: Config, biased: frozenset[str], *, window: int | None) -> Changes:
    """Llama's block under the name of the family that has its biases and windows."""
    kinds = config.get("layer_types") or ["sliding_attention"]
    some = window is not None and "sliding_attention" in kinds
    every = some and set(kinds) == {"sliding_attention"}
    unsaid = dict.fromkeys(("layer_types", "use_sliding_window", "max_window_layers"))
    if "o" not in biased and (biased or (some and not every)):
        slides = {"sliding_window": window, "layer_types": list(kinds)} if some else {}
        return "qwen2", {**unsaid, "attention_bias": None, "use_sliding_window": some, **slides}
    if some and biased:
        raise InputError("a sliding window beside a bias of o_proj", needed="either: no dense class has both")
    if some:
        return "mistral", {**unsaid, "sliding_window": window}
    return "llama", {**unsaid, "sliding_window": None, "attention_bias": bool(biased)}


def _mixtral(config: Config, biased: frozenset[str]) -> Changes:
    return _llama_like(config, biased, window=config.get("sliding_window"))


def _qwen2(config: Config, biased: frozenset[str]) -> Changes:
    return _llama_like(
        config, biased, window=config.get("sliding_window") if config.get("use_sliding_window") else None
    )


def _glm4(config: Config, biased: frozenset[str]) -> Changes:
    if not config.get("use_qk_norm"):
        return _llama_like(config, biased, window=None)
    if config.get("attention_bias"):
        raise InputError("biases of q, k and v beside their norms", needed="either: no dense class has both")
    return "qwen3", {"use_sliding_window": False}


def _granite(config: Config, biased: frozenset[str]) -> Changes:
    """Granite where its factors change something; its windowed mixture slides in name over all that there is."""
    plain = all(config.get(key, value) == value for key, value in NEUTRAL.items())
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    found = config.get("attention_multiplier")
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 and isinstance(found, int | float):
        plain = plain and found == (hidden // heads) ** -0.5
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(positions, int) and window >= positions:
        window = None
    if plain and found is not None:
        family, changes = _llama_like(config, biased, window=window)
        return family, {**dict.fromkeys((*NEUTRAL, "attention_multiplier")), **changes}
    if window is not None:
        raise InputError("a sliding window beside Granite's factors", needed="either: no dense class has both")
    return "granite", {"layer_types": None, "sliding_window": None}


ARCHITECTURES = {
    "cohere2": "Cohere2ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "granite": "GraniteForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

DENSE: dict[str, Counterpart] = {
    "cohere2_moe": Counterpart(
        _same("cohere2", rms_norm_eps=None),
        ("layer_norm_eps", "logit_scale", "layer_types"),
        {"shared_expert_combination_strategy": "sum"},
    ),
    "ernie4_5_moe": Counterpart(_same("ernie4_5"), ("rms_norm_eps", "head_dim")),
    "flex_olmo": Counterpart(_same("olmo2")),
    "glm4_moe": Counterpart(
        _glm4, ("rms_norm_eps", "head_dim"), {"partial_rotary_factor": 1.0, "routed_scaling_factor": 1.0}
    ),
    "granitemoe": Counterpart(_granite),
    "granitemoe_swa": Counterpart(_granite),
    "granitemoehybrid": Counterpart(_granite, fixed={"position_embedding_type": "rope"}),
    "granitemoeshared": Counterpart(_granite),
    "hunyuan_v1_moe": Counterpart(_same("hunyuan_v1_dense"), ("rms_norm_eps", "head_dim")),
    "mixtral": Counterpart(_mixtral),
    "qwen2_moe": Counterpart(_qwen2),
    "qwen3_moe": Counterpart(_same("qwen3"), ("rms_norm_eps", "head_dim")),
}
"""Every mixture that `densify` reads, by model_type: all that `convert` writes."""


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
    for key, value in row.fixed.items():
        if config.get(key) != value:
            raise InputError(f"{config.get(key)!r}", where=f"{where}: {key}", needed=f"{value!r}")
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
    try:
        family, changes = row.family(config, _biased(checkpoint))
    except InputError as error:
        raise InputError(error.found, where=where, needed=error.needed) from None
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


def _biased(checkpoint: Checkpoint) -> frozenset[str]:
    """Projections with a bias that is not zero somewhere (a target adds zeros where its class has more of them)."""
    biases = (name for name in checkpoint.tensors if ".self_attn." in name and name.endswith("_proj.bias"))
    return frozenset(name.split(".")[-2][0] for name in biases if checkpoint.array(name).any())
