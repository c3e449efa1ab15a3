"""Cohere2-MoE, in transformers 5 alone: Cohere2's parallel block with softmax over the kept logits and a shared sum."""

from prismoe.target import Slot, Target

MLP = "model.layers.{l}.mlp"

TARGET = Target(
    name="cohere2_moe",
    architecture="Cohere2MoeForCausalLM",
    block="parallel",
    multipliers=("logit_scale",),
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
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": width,
        "prefix_dense_intermediate_size": dense.intermediate_size,
        "num_shared_experts": shared_width // width,
        "shared_expert_combination_strategy": "sum",
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
        "layer_norm_eps": dense.rms_eps,
        "rms_norm_eps": None,
        "layer_types": list(dense.layer_types),
        "mlp_layer_types": ["dense" if layer in shape.dense_layers else "sparse" for layer in range(dense.num_layers)],
        "sliding_window_pattern": 4,
        "prefix_dense_sliding_window_pattern": 1,
        **dense.multipliers,
    },
    rules=(),
)
