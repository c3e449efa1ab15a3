"""Granite-MoE with a shared expert: softmax over the kept top-k logits plus an always-on block of any width.

Its four multipliers change nothing where the source has none; experts are fused on disk, gate rows above up rows.
"""

from prismoe.checkpoint.families import GRANITE
from prismoe.target import Rule, Slot, Target

LAYER = "model.layers.{l}"

TARGET = Target(
    name="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    router=f"{LAYER}.block_sparse_moe.router.layer.weight",
    experts=(
        Slot(f"{LAYER}.block_sparse_moe.input_linear.weight", ("gate", "up")),
        Slot(f"{LAYER}.block_sparse_moe.output_linear.weight", ("down",)),
    ),
    shared=(
        Slot(f"{LAYER}.shared_mlp.input_linear.weight", ("gate", "up")),
        Slot(f"{LAYER}.shared_mlp.output_linear.weight", ("down",)),
    ),
    biases=("q", "k", "v", "o"),
    multipliers=tuple(GRANITE),
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": width,
        "shared_intermediate_size": shared_width,
        **dense.granite_multipliers,
        "position_embedding_type": "rope",
    },
    rules=(
        Rule("qk_norm", lambda dense, shape: not dense.qk_norm, "False: no norm on queries and keys"),
        Rule("sliding_window", lambda dense, shape: dense.sliding_window is None, "None: it attends to everything"),
        Rule(
            "head_dim",
            lambda dense, shape: dense.head_dim * dense.num_heads == dense.hidden_size,
            "hidden_size / num_heads: most readers derive it",
        ),
        Rule("dense_layers", lambda dense, shape: not shape.dense_layers, "[]: every layer has experts"),
    ),
)
