"""Granite hybrid with attention in every layer and no Mamba: granitemoeshared under the one name that MLX reads too.

The Mamba keys are there because readers check them; no layer uses them.
"""

from prismoe.checkpoint.families import GRANITE
from prismoe.target import Rule, Slot, Target

LAYER = "model.layers.{l}"

TARGET = Target(
    name="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    router=f"{LAYER}.block_sparse_moe.router.layer.weight",
    experts=(
        Slot(f"{LAYER}.block_sparse_moe.input_linear.weight", ("gate", "up")),
        Slot(f"{LAYER}.block_sparse_moe.output_linear.weight", ("down",)),
    ),
    shared=(
        Slot(f"{LAYER}.shared_mlp.input_linear.weight", ("gate", "up")),
        Slot(f"{LAYER}.shared_mlp.output_linear.weight", ("down",)),
    ),
    shared_always=True,
    biases=("q", "k", "v", "o"),
    multipliers=tuple(GRANITE),
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": width,
        "shared_intermediate_size": shared_width,
        **dense.granite_multipliers,
        "position_embedding_type": "rope",
        "layer_types": ["attention"] * dense.num_layers,
        "mamba_n_heads": 1,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_head": 2 * dense.hidden_size,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": None,
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
