"""Qwen2-MoE: biased q/k/v, a window per layer, layers may stay dense, and a shared expert behind a sigmoid gate.

The gate's row is so small that its sigmoid is exactly one half in every float format, and not zero, because llama.cpp
computes sigmoid(z) as silu(z)/z; the half is made good in the shared down matrix. Zero neurons stand in for a shared
expert that the plan has not.
"""

from prismoe.target import Constant, Rule, Slot, Target

MLP = "model.layers.{l}.mlp"

TARGET = Target(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    router=f"{MLP}.gate.weight",
    experts=(
        Slot(MLP + ".experts.{e}.gate_proj.weight", ("gate",)),
        Slot(MLP + ".experts.{e}.up_proj.weight", ("up",)),
        Slot(MLP + ".experts.{e}.down_proj.weight", ("down",)),
    ),
    shared=(
        Slot(f"{MLP}.shared_expert.gate_proj.weight", ("gate",)),
        Slot(f"{MLP}.shared_expert.up_proj.weight", ("up",)),
        Slot(f"{MLP}.shared_expert.down_proj.weight", ("down",)),
    ),
    shared_factor=2.0,
    shared_always=True,
    constants=(
        Constant(f"{MLP}.shared_expert_gate.weight", lambda dense, shape: (1, dense.hidden_size), value=2.0**-100),
    ),
    biases=("q", "k", "v"),
    biased_always=True,
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": shared_width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(shape.dense_layers),
        "norm_topk_prob": True,
        "qkv_bias": True,
        "use_sliding_window": dense.sliding_window is not None,
        "max_window_layers": dense.num_layers - len(dense.sliding_layers),
        "layer_types": list(dense.layer_types),
    },
    rules=(
        Rule("qk_norm", lambda dense, shape: not dense.qk_norm, "False: no norm on queries and keys"),
        Rule("o_bias", lambda dense, shape: not dense.o_bias, "False: its output projection has no bias"),
        Rule(
            "head_dim",
            lambda dense, shape: dense.head_dim * dense.num_heads == dense.hidden_size,
            "hidden_size / num_heads: most readers derive it",
        ),
    ),
)
