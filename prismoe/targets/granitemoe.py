"""Granite-MoE: softmax over the kept top-k logits, no shared expert, biases on attention if the source has any.

Its four multipliers change nothing where the source has none; experts are fused on disk, gate rows above up rows.
"""

from prismoe.checkpoint.families import GRANITE
from prismoe.target import Rule, Slot, Target

MOE = "model.layers.{l}.block_sparse_moe"

TARGET = Target(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    router=f"{MOE}.router.layer.weight",
    experts=(
        Slot(f"{MOE}.input_linear.weight", ("gate", "up")),
        Slot(f"{MOE}.output_linear.weight", ("down",)),
    ),
    biases=("q", "k", "v", "o"),
    multipliers=tuple(GRANITE),
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": width,
        **dense.granite_multipliers,
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
        Rule("shared_width", lambda dense, shape: shape.shared_width == 0, "0: it has no shared expert"),
    ),
)
