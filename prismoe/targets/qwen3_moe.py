"""Qwen3-MoE: q/k norms per head, renormalised top-k softmax, layers may stay dense. Runs everywhere.

`norm_topk_prob` is always true: llama.cpp renormalises whatever the flag says.
"""

from prismoe.target import Rule, Slot, Target

MLP = "model.layers.{l}.mlp"

TARGET = Target(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    router=f"{MLP}.gate.weight",
    experts=(
        Slot(MLP + ".experts.{e}.gate_proj.weight", ("gate",)),
        Slot(MLP + ".experts.{e}.up_proj.weight", ("up",)),
        Slot(MLP + ".experts.{e}.down_proj.weight", ("down",)),
    ),
    config=lambda dense, shape, width, shared_width: {
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(shape.dense_layers),
        "norm_topk_prob": True,
        "use_sliding_window": dense.sliding_window is not None,
        # Readers before transformers 4.53 slide from this layer on.
        "max_window_layers": dense.num_layers - len(dense.sliding_layers),
    },
    rules=(
        Rule("qk_norm", lambda dense, shape: dense.qk_norm, "True: it always norms queries and keys"),
        Rule("qkv_bias", lambda dense, shape: dense.qkv_bias == dense.o_bias, "the same as o_bias: one switch for all"),
        Rule("sliding_layers", lambda dense, shape: dense.slides_uniformly, "all layers or none: one global window"),
        Rule("shared_width", lambda dense, shape: shape.shared_width == 0, "0: it has no shared expert"),
    ),
)
