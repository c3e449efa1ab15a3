"""Ernie 4.5 MoE: interleaved rope, a plain shared expert, the first layers may stay dense; the router is softmax.

llama.cpp reads the shared width as intermediate_size / num_key_value_heads, and no layer with experts reads that key.
"""

from prismoe.target import Constant, Rule, Slot, Target

MLP = "model.layers.{l}.mlp"

TARGET = Target(
    name="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    block="interleaved",
    router=f"{MLP}.gate.weight",
    experts=(
        Slot(MLP + ".experts.{e}.gate_proj.weight", ("gate",)),
        Slot(MLP + ".experts.{e}.up_proj.weight", ("up",)),
        Slot(MLP + ".experts.{e}.down_proj.weight", ("down",)),
    ),
    shared=(
        Slot(f"{MLP}.shared_experts.gate_proj.weight", ("gate",)),
        Slot(f"{MLP}.shared_experts.up_proj.weight", ("up",)),
        Slot(f"{MLP}.shared_experts.down_proj.weight", ("down",)),
    ),
    shared_unit="expert",
    constants=(
        Constant(
            f"{MLP}.moe_statics.e_score_correction_bias",
            lambda dense, shape: (1, shape.num_experts),
            dtype="F32",
            experts_axis=1,
        ),
    ),
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": dense.intermediate_size if shape.dense_layers else shared_width * dense.num_kv_heads,
        "moe_intermediate_size": width,
        "moe_k": shape.top_k,
        "moe_num_experts": shape.num_experts,
        "moe_num_shared_experts": shared_width // width,
        "moe_layer_start_index": len(shape.dense_layers),
        "moe_layer_end_index": dense.num_layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "use_bias": False,
    },
    rules=(
        Rule(
            "dense_layers",
            lambda dense, shape: shape.dense_layers == tuple(range(len(shape.dense_layers))),
            "the first ones: it counts them from the top",
        ),
    ),
)
