"""Granite-MoE with a window per layer and attention sinks, in transformers 5 alone: shared expert and window in one.

A sink of -1e4 takes no weight at all, and a window as long as the model's positions hides nothing. Fused on disk as in
memory.
"""

from prismoe.checkpoint.families import GRANITE
from prismoe.target import Constant, Rule, Slot, Target

LAYER = "model.layers.{l}"

TARGET = Target(
    name="granitemoe_swa",
    architecture="GraniteMoeSWAForCausalLM",
    router=f"{LAYER}.block_sparse_moe.router.weight",
    experts=(
        Slot(f"{LAYER}.block_sparse_moe.experts.gate_up_proj", ("gate", "up")),
        Slot(f"{LAYER}.block_sparse_moe.experts.down_proj", ("down",)),
    ),
    shared=(
        Slot(f"{LAYER}.shared_mlp.input_linear.weight", ("gate", "up")),
        Slot(f"{LAYER}.shared_mlp.output_linear.weight", ("down",)),
    ),
    constants=(Constant(f"{LAYER}.self_attn.sinks", lambda dense, shape: (dense.num_heads,), value=-1e4),),
    biases=("q", "k", "v", "o"),
    multipliers=tuple(GRANITE),
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": width,
        "shared_intermediate_size": shared_width,
        **dense.granite_multipliers,
        "sliding_window": dense.sliding_window or dense.max_positions,
        "layer_types": list(dense.layer_types) if dense.sliding_layers else ["sliding_attention"] * dense.num_layers,
        "layer_rope_theta": [dense.rope_theta] * dense.num_layers,
    },
    rules=(
        Rule("qk_norm", lambda dense, shape: not dense.qk_norm, "False: no norm on queries and keys"),
        Rule(
            "head_dim",
            lambda dense, shape: dense.head_dim * dense.num_heads == dense.hidden_size,
            "hidden_size / num_heads: most readers derive it",
        ),
        Rule("dense_layers", lambda dense, shape: not shape.dense_layers, "[]: every layer has experts"),
    ),
)
